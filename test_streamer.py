"""Tests of streamer, in the order of its sections, and two commands beside them.

    pytest                                      the tests
    python test_streamer.py bench               the benchmark: targets, beside what was measured
    python test_streamer.py <task_id> [--url …] watch a task on a server; exits 0 if it SUCCEEDED

MetaGPT is tested by running it: `ModelServer` stands in for the model's HTTP API, not for
MetaGPT. What crosses a socket is tested over a real one, most of it against
`python streamer.py`. Nothing sleeps to wait: gates (threading.Event), closing streams and one
TIMEOUT decide.
"""

from __future__ import annotations

import argparse
import ast
import asyncio
import configparser
import contextlib
import dataclasses
import errno
import functools
import importlib
import importlib.metadata
import importlib.util
import io
import itertools
import json
import logging
import math
import os
import random
import re
import resource
import select
import selectors
import shlex
import shutil
import signal
import socket
import socketserver
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
import tracemalloc
import types
import zipfile
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar
from urllib.parse import quote, urlsplit

import anyio
import anyio.lowlevel
import httpx2
import pytest
import redis
import uvicorn
import yaml  # type: ignore[import-untyped]
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.testclient import TestClient
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

import streamer
from streamer import EventType, Run, Settings, TaskStatus, create_app

HERE = Path(__file__).resolve().parent
TIMEOUT = 30.0  # seconds; what takes longer hangs
PROCESS_TIMEOUT = 4 * TIMEOUT  # of a process, which imports much and shares its core
KEY = "sk-secret-0123456789abcdef"
# What a run that succeeds produces, of a model that does not show its thinking.
WHOLE_RUN = set(EventType) - {
    *("ERROR", "REASONING", "QUESTION", "ANSWER", "TASK_ERROR", "TASK_CANCELLED"),
}
TERMINAL = ("TASK_COMPLETE", "TASK_ERROR", "TASK_CANCELLED")


# -----------------------------------------------------------------------------
# Tools
# -----------------------------------------------------------------------------


class Client:
    """A user of one server."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.http = httpx2.Client(base_url=url, timeout=TIMEOUT)

    def create(self, prompt: str = "Build a todo app", **body: Any) -> str:
        response = self.http.post("/api/tasks", json={"input_prompt": prompt, **body})
        assert response.status_code == 201, response.text
        return str(response.json()["id"])

    def post(self, path: str) -> httpx2.Response:
        return self.http.post(path)

    def get(self, path: str) -> Any:
        response = self.http.get(path)
        assert response.status_code == 200, response.text
        return response.json()

    def socket(self, task_id: str, query: str = "") -> ClientConnection:
        url = f"{self.url.replace('http', 'ws', 1)}/ws/tasks/{task_id}?{query}"
        return connect(
            url, open_timeout=TIMEOUT, close_timeout=TIMEOUT, max_size=None, compression=None
        )

    def follow(self, task_id: str, query: str = "") -> Watcher:
        watcher = Watcher(self.socket(task_id, query))
        watcher.wait_for(lambda: watcher.messages)
        return watcher

    def watch(self, task_id: str, query: str = "") -> Watcher:
        """To the end."""
        return watched(self.socket(task_id, query))

    @property
    def address(self) -> tuple[str, int]:
        host, port = self.url.removeprefix("http://").split(":")
        return host, int(port)


class Watcher:
    """What a socket is sent, from now on until its connection ends; it is read in a thread."""

    def __init__(self, websocket: ClientConnection) -> None:
        self.texts: list[str] = []
        self.messages: list[dict[str, Any]] = []
        self.close_code: int | None = None
        self._heard = threading.Condition()
        self._thread = threading.Thread(target=self._read, args=[websocket])
        self._thread.start()

    def _read(self, websocket: ClientConnection) -> None:
        with websocket, contextlib.suppress(ConnectionClosed):
            while True:
                text = websocket.recv(decode=True)
                with self._heard:
                    self.texts.append(text)
                    self.messages.append(json.loads(text))
                    self._heard.notify_all()
        self.close_code = websocket.close_code

    def wait_for(self, happened: Callable[[], Any]) -> Any:
        with self._heard:
            found = self._heard.wait_for(happened, TIMEOUT)
            assert found, self.messages[-1:]
            return found

    def data(self, kind: str) -> list[dict[str, Any]]:
        return [message["data"] for message in self.messages if message["type"] == kind]

    @property
    def events(self) -> list[dict[str, Any]]:
        return self.data("event")

    @property
    def states(self) -> list[dict[str, Any]]:
        return self.data("state")

    @property
    def last_state(self) -> dict[str, Any]:
        return self.states[-1]

    @property
    def task_id(self) -> str:
        return str(self.data("connected")[0]["task_id"])

    @property
    def ids(self) -> list[int]:
        return [event["event_id"] for event in self.events]

    def of(self, *types: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event_type"] in types]

    def sees(self, count: int = 1) -> None:
        """Waits for so many events."""
        self.wait_for(lambda: len(self.events) >= count)

    def until(self, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The first state that fits, waited for."""
        return dict(self.wait_for(lambda: next(filter(wanted, self.states), None)))

    def lives(self, seconds: float) -> bool:
        """Whether its connection outlasts so many seconds."""
        self._thread.join(seconds)
        return self._thread.is_alive()

    def join(self) -> list[dict[str, Any]]:
        """Its events, once its connection has ended."""
        assert not self.lives(4 * TIMEOUT), self.messages[-3:]
        return self.events


def watched(websocket: ClientConnection) -> Watcher:
    """All that comes until the connection ends."""
    watcher = Watcher(websocket)
    watcher.join()
    return watcher


Found = TypeVar("Found")


def wait_until(look: Callable[[], Found]) -> Found:
    """What `look` returns, once that is true: for what can only be looked at."""
    end = time.monotonic() + TIMEOUT
    found = look()
    while not found:
        assert time.monotonic() < end, f"still {found!r} after {TIMEOUT:g} s"
        time.sleep(0.02)
        found = look()
    return found


def raw_request(client: Client, request: bytes) -> socket.socket:
    """A connection over which a request that was written by hand has been sent."""
    sock = socket.create_connection(client.address, TIMEOUT)
    sock.sendall(request)
    return sock


def raw_answer(client: Client, request: bytes) -> bytes:
    """The first bytes that come back for a request that was written by hand."""
    with raw_request(client, request) as sock:
        return sock.recv(65536)


def read_until(sock: socket.socket, wanted: bytes) -> bytes:
    """What comes, up to a piece that has `wanted` in it."""
    received = b""
    while wanted not in received:
        data = sock.recv(65536)
        assert data, received[-200:]
        received += data
    return received


def read_to_end(sock: socket.socket) -> bytes:
    """All that comes until the other side ends the connection, or aborts it."""
    received = bytearray()
    sock.settimeout(TIMEOUT)
    with contextlib.suppress(ConnectionError):
        for data in iter(partial(sock.recv, 1 << 20), b""):
            received += data
    return bytes(received)


def receive_until(
    websocket: ClientConnection, wanted: Callable[[dict[str, Any]], bool]
) -> dict[str, Any]:
    """The next message that fits."""
    end = time.monotonic() + 4 * TIMEOUT  # states come in between, as often as the heart beats
    while True:
        left = min(TIMEOUT, end - time.monotonic())
        message: dict[str, Any] = json.loads(websocket.recv(timeout=left))
        if wanted(message):
            return message


def is_event(event_type: str) -> Callable[[dict[str, Any]], bool]:
    return lambda message: message["data"].get("event_type") == event_type


@contextlib.contextmanager
def serving(server: uvicorn.Server, listener: socket.socket) -> Iterator[str]:
    """Runs a server in a thread; the socket listens already, so that nobody has to wait for it."""
    listener.listen(1024)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="server")
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(TIMEOUT)
        assert not thread.is_alive()


def loopback() -> socket.socket:
    bound = socket.socket()
    bound.bind(("127.0.0.1", 0))
    return bound


@contextlib.contextmanager
def live(runner: Any, workspace: Path, **settings: Any) -> Iterator[Client]:
    """The service in this process, with a runner of the test's."""
    chosen = Settings(workspace=workspace, **{"test_mode": True, "grace": 5.0, **settings})
    with serving(streamer.Server(create_app(chosen, runner=runner), chosen), loopback()) as url:
        client = Client(url)
        with client.http:
            yield client


class Process:
    """`python streamer.py …` (or another script), as a user starts it."""

    def __init__(self, *command: str, cwd: Path, environ: Mapping[str, str] | None = None) -> None:
        others = ("STREAMER_", "OPENAI_", "ANTHROPIC_")
        clean = {name: value for name, value in os.environ.items() if not name.startswith(others)}
        environ = {
            **clean,
            "HOME": str(cwd),
            "PYTHONPATH": str(HERE),
            "PYTHONWARNINGS": "ignore",
            **(environ or {}),
        }
        pipe = subprocess.PIPE
        self.cwd = cwd
        self.popen = subprocess.Popen(
            [sys.executable, *command], cwd=cwd, env=environ, stdout=pipe, stderr=pipe
        )
        self.errors: list[str] = []
        self.output = b""
        self._said = threading.Condition()
        self._ended = False

        def read_errors() -> None:
            assert self.popen.stderr is not None
            for line in self.popen.stderr:
                with self._said:
                    self.errors.append(line.decode())
                    self._said.notify_all()
            with self._said:
                self._ended = True
                self._said.notify_all()

        def read_output() -> None:
            assert self.popen.stdout is not None
            self.output = self.popen.stdout.read()

        self._readers = [threading.Thread(target=read) for read in (read_errors, read_output)]
        for reader in self._readers:
            reader.start()

    def says(self, text: str) -> bool:
        """Waits until a line on stderr holds `text`; False if the process ends without."""
        with self._said:
            self._said.wait_for(
                lambda: self._ended or text in "".join(self.errors), PROCESS_TIMEOUT
            )
            return text in "".join(self.errors)

    @functools.cached_property
    def client(self) -> Client:
        assert self.says(" is at http://"), "".join(self.errors)
        found = re.search(r" is at (http://[^\s/;]+)", "".join(self.errors))
        assert found is not None
        return Client(found[1])

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        if self.popen.poll() is None:
            self.popen.send_signal(how)
        return self.wait()

    def wait(self) -> int:
        """The exit code, once everything is read and closed; may be called again."""
        code = self.popen.wait(PROCESS_TIMEOUT)
        if "client" in vars(self):
            self.client.http.close()
        for reader in self._readers:
            reader.join(TIMEOUT)
        for stream in (self.popen.stdout, self.popen.stderr):
            assert stream is not None
            stream.close()
        return code


@contextlib.contextmanager
def process(
    *command: str, cwd: Path, environ: Mapping[str, str] | None = None
) -> Iterator[Process]:
    started = Process(*command, cwd=cwd, environ=environ)
    try:
        yield started
    finally:
        started.stop(signal.SIGKILL)


SERVER = str(HERE / "streamer.py")
# The command line, with a scripted team that hurries: `process("-c", QUICK, …)`, or one that
# can be watched.
QUICK = """
import functools, sys, streamer
streamer.run_scripted = functools.partial(streamer.run_scripted, seconds=0.2)
sys.exit(streamer.main())
"""
BRISK = QUICK.replace("0.2", "1.0")


DONE = b"data: [DONE]\n\n"
USE_OTHER = "'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."


def sse(*documents: Any) -> bytes:
    return b"".join(b"data: %s\n\n" % json.dumps(document).encode() for document in documents)


def choice(delta: Any, finish_reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}]}


MARKS = re.compile(r"\[(?:mark=\w+|task=[^\]\s]+|no usage|code=[^\]]+)\]")


# What a model of some marks writes. The second leaves a process in its group that has no
# environment, one in another session by way of a parent that ends, and may not end itself.
LEAVES = """
import os, subprocess, sys, time
sleep = [sys.executable, "-c", "import time; time.sleep(1000)"]
left = [subprocess.Popen(sleep, env={{}}).pid]
read, write = os.pipe()
if os.fork() == 0:
    os.setsid()
    os.write(write, b"%d" % subprocess.Popen(sleep).pid)
    os._exit(0)
left.append(int(os.read(read, 100)))
with open("left.tmp", "w") as file:
    print(os.getpid(), *left, file=file)
os.rename("left.tmp", "left.txt")
{end}
"""
PROGRAMS = {
    "environ": "import os; open('environ.txt', 'w').write(repr(dict(os.environ)))\n",
    "leaves": LEAVES.format(end=""),
    "stays": LEAVES.format(end="time.sleep(1000)"),
}


class ModelServer:
    """An OpenAI-compatible API on loopback.

    A prompt steers it by marks: [mark=…] names the task, [401] its fate.
    """

    def __init__(self) -> None:
        self.requests: dict[str, list[str]] = defaultdict(list)  # mark → prompts
        self.bodies: dict[str, list[bytes]] = defaultdict(list)  # mark → what was sent
        # A client's address, one object for each connection → marks that came through it.
        self.connections: dict[int, tuple[Any, set[str]]] = {}
        self.usage: dict[str, Counter[str]] = defaultdict(Counter)
        self.coded: Counter[str] = Counter()  # mark → requests for code
        self.asked = threading.Event()  # a [slow] prompt has come
        self.slow = threading.Event()  # until it is set, they are not answered

    async def chat(self, request: Request) -> Response:
        body = await request.json()
        prompt = "\n".join(message["content"] for message in body["messages"])
        mark = found[1] if (found := re.search(r"\[mark=(\w+)\]", prompt)) else ""
        self.requests[mark].append(prompt)
        self.bodies[mark].append(await request.body())
        address = request.scope["client"]
        self.connections.setdefault(id(address), (address, set()))[1].add(mark)
        turn = len(self.requests[mark])
        if "[slow]" in prompt:
            self.asked.set()
            await asyncio.to_thread(self.slow.wait)
        refusal = self._refusal(body, prompt, turn)
        if refusal is not None:
            return refusal
        last = body["messages"][-1]["content"]
        text = self._answer(last, prompt, mark, turn)
        fault = self._fault(last, prompt, mark)
        if fault == "429":
            return JSONResponse({"error": {"message": "slow down"}}, 429, {"retry-after-ms": "50"})
        if fault == "redirect":
            return Response("", 307, {"location": "/v1/elsewhere"})
        if fault == "huge":
            text = f"```python\n{'x = 1  # ' * 9000}\n```"
        usage = {
            "prompt_tokens": len(prompt) // 4,
            "completion_tokens": len(text) // 4,
            "total_tokens": 0,
        }
        if "[no usage]" not in prompt:
            self.usage[mark].update(usage)
        head = {"id": "chat", "created": 1, "model": body["model"]}
        if not body.get("stream"):
            finish_reason = fault if fault == "length" else "stop"
            message = {"role": "assistant", "content": "" if fault == "empty" else text}
            choices = [{"index": 0, "finish_reason": finish_reason, "message": message}]
            whole = {**head, "object": "chat.completion", "choices": choices, "usage": usage}
            return JSONResponse(whole)
        chunks = self._chunks(head, text, None if "[no usage]" in prompt else usage, fault)
        return StreamingResponse(chunks)

    async def _chunks(self, head: dict[str, Any], text: str, usage: Any, fault: str) -> Any:
        head = {**head, "object": "chat.completion.chunk"}
        pieces = [text] if fault == "huge" else re.findall(r"\S+\s*|\s+", text)
        if fault == "empty":
            pieces = []
        elif fault not in ("", "huge"):
            pieces = pieces[: len(pieces) // 2]
        if fault == "thinks":
            yield sse({**head, **choice({"reasoning_content": "Let me think."})})
        for piece in pieces:
            if piece == "[pause]\n":
                await asyncio.to_thread(self.slow.wait)
            yield sse({**head, **choice({"content": piece})})
            await asyncio.sleep(0.001)
        if fault == "silent":
            await asyncio.Event().wait()
        while fault == "endless":
            yield sse({**head, **choice({"content": "x = 1  # " * 1000})})
            await asyncio.sleep(0.001)
        if fault == "error":
            yield sse({"error": {"message": "the engine died", "type": "server_error"}})
        if fault in ("cut", "error"):
            return
        cut = fault in ("length", "content_filter", "tool_calls")
        finish_reason = fault if cut else "stop"
        yield sse({**head, **choice({"content": ""}, finish_reason), "usage": usage})
        yield DONE

    def _fault(self, last: str, prompt: str, mark: str) -> str:
        """What [code=…] asks for where code is asked for, `once` or always."""
        found = re.search(r"\[code=(\w+)( once)?\]", prompt)
        if found is None or "## format example" in last or "## Code Review Result" in last:
            return ""
        self.coded[mark] += 1
        return "" if found[2] and self.coded[mark] > 1 else found[1]

    async def anthropic(self, request: Request) -> Response:
        """Anthropic's API; overloaded after a 200, then with thinking."""
        body = await request.json()
        prompt = body["messages"][-1]["content"]
        mark = re.findall(r"\[mark=(\w+)\]", prompt)[0]
        self.requests[mark].append(prompt)
        text = self._answer(prompt, prompt, mark, 2)
        error = {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}
        begun = {"type": "message_start", "message": {"usage": {"input_tokens": 7}}}
        if len(self.requests[mark]) == 1:
            return Response(sse(begun, error), media_type="text/event-stream")
        ended = {"delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 5}}
        deltas = [{"delta": {"thinking": "Let me think."}}, {"delta": {"text": text}}]
        return Response(sse(begun, *deltas, ended), media_type="text/event-stream")

    async def ollama(self, request: Request) -> Response:
        """Ollama's API; an error in the first answer, then with thinking."""
        body = await request.json()
        prompt = body["messages"][-1]["content"]
        mark = re.findall(r"\[mark=(\w+)\]", prompt)[0]
        self.requests[mark].append(prompt)
        text = self._answer(prompt, prompt, mark, 2)
        lines: list[dict[str, Any]] = [{"message": {"content": "", "thinking": "Let me think."}}]
        lines += [{"message": {"content": text}}]
        lines += [{"done": True, "done_reason": "stop", "prompt_eval_count": 7, "eval_count": 5}]
        if len(self.requests[mark]) == 1:
            lines = [{"error": "CUDA error"}]
        return Response("".join(json.dumps(line) + "\n" for line in lines))

    def _refusal(self, body: dict[str, Any], prompt: str, turn: int) -> Response | None:
        if body["model"] == "gpt-5":  # OpenAI's rules for its models that think
            for name, text in (("max_tokens", USE_OTHER), ("temperature", "only 1 is supported")):
                if name in body:
                    return JSONResponse({"error": {"message": text, "param": name}}, 400)
        if "[503 once]" in prompt and turn == 1:
            return JSONResponse({"error": {"message": "overloaded"}}, 503, {"Retry-After": "1"})
        for status, code in ((401, "invalid_api_key"), (404, "model_not_found")):
            if f"[{status}]" in prompt:
                error = {"message": f"refused, you sent {KEY}", "code": code}
                return JSONResponse({"error": error}, status)
        return None

    def _answer(self, last: str, prompt: str, mark: str, turn: int) -> str:
        if "[pause]" in prompt:
            return "first words [pause]\nand the rest"
        if "[garbage]" in prompt or ("[garbage once]" in prompt and turn == 1):
            return "I would rather not answer in JSON."
        if "[unclosed once]" in prompt and turn == 1:
            return "[CONTENT]" * 11_000
        if example := re.search(
            r"## format example\s*\[CONTENT\](.*?)\[/CONTENT\]", last, re.DOTALL
        ):
            answer = json.loads(example[1])
            answer["Anything UNCLEAR"] = " ".join(sorted(set(MARKS.findall(prompt)))) or "no"
            for name in re.findall(r"\[task=(\S+)\]", prompt):
                names = [] if name == "none" else [name]
                answer = {**answer, **({"Task list": names} if "Task list" in answer else {})}
            return f"[CONTENT]\n{json.dumps(answer, indent=4)}\n[/CONTENT]"
        if "## Code Review Result" in last:
            review = f"## Code Review: [mark={mark}]\n1. Yes.\n\n## Actions\npass\n\n"
            return review + "## Code Review Result\nLGTM\n"
        if "[blank lines]" in prompt:
            return "```python\nimport os" + "\n" * 100_000
        return f"```python\nprint('[mark={mark}]')\n{PROGRAMS.get(mark, '')}```"


@contextlib.contextmanager
def model_server() -> Iterator[tuple[ModelServer, str]]:
    model = ModelServer()
    routes = [
        Route("/v1/chat/completions", model.chat, methods=["POST"]),
        Route("/v1/messages", model.anthropic, methods=["POST"]),
        Route("/api/chat", model.ollama, methods=["POST"]),
    ]
    app = Starlette(routes=routes)
    config = uvicorn.Config(
        app, log_config=None, timeout_graceful_shutdown=1, timeout_keep_alive=int(TIMEOUT)
    )
    with serving(uvicorn.Server(config), loopback()) as url:
        try:
            yield model, f"{url}/v1"
        finally:
            model.slow.set()


def hostile_git(folder: Path) -> dict[str, str]:
    """An environment and a configuration of git that hide files, run programs, name another."""
    hook = f"#!/bin/sh\ntouch {folder}/ran\n"
    for name in ("pre-commit", "commit-msg", "post-commit", "post-index-change"):
        path = folder / "template" / "hooks" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(hook)
        path.chmod(0o755)
    (folder / "ignore").write_text("*.json\n*.py\n")
    (folder / "attributes").write_text("* filter=program\n")
    config = {
        "core.fsmonitor": f"touch {folder}/ran; false",
        "core.hooksPath": f"{folder}/template/hooks",
        "core.excludesFile": f"{folder}/ignore",
        "core.attributesFile": f"{folder}/attributes",
        "init.templateDir": f"{folder}/template",
        "filter.program.clean": f"touch {folder}/ran; cat",
        "commit.gpgSign": "true",
        "status.showUntrackedFiles": "no",
    }
    for key, value in config.items():
        subprocess.run(["git", "config", "--file", folder / "config", key, value], check=True)
    other = {name: str(folder / "other") for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")}
    return {"GIT_CONFIG_GLOBAL": str(folder / "config"), **other}


# Teams of somebody's own: MetaGPT's tutorials, wrapped in a function each, and what asks a person.
OWN_TEAMS = '''
import re
from metagpt.actions import Action, UserRequirement
from metagpt.actions.action_node import ActionNode
from metagpt.logs import logger
from metagpt.roles import Role
from metagpt.schema import Message
from metagpt.team import Team


def parse_code(text):
    found = re.search(r"```python(.*)```", text, re.DOTALL)
    return found.group(1) if found else text


class SimpleWriteCode(Action):
    PROMPT_TEMPLATE: str = """
    Write a python function that can {instruction}.
    Return ```python your_code_here ``` with NO other texts,
    your code:
    """
    name: str = "SimpleWriteCode"

    async def run(self, instruction: str):
        return parse_code(await self._aask(self.PROMPT_TEMPLATE.format(instruction=instruction)))


class SimpleCoder(Role):
    name: str = "Alice"
    profile: str = "SimpleCoder"

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self._watch([UserRequirement])
        self.set_actions([SimpleWriteCode])


class SimpleWriteTest(Action):
    PROMPT_TEMPLATE: str = "Context: {context} Write {k} unit tests using pytest, your code:"
    name: str = "SimpleWriteTest"

    async def run(self, context: str, k: int = 3):
        return parse_code(await self._aask(self.PROMPT_TEMPLATE.format(context=context, k=k)))


class SimpleTester(Role):
    name: str = "Bob"
    profile: str = "SimpleTester"

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.set_actions([SimpleWriteTest])
        self._watch([SimpleWriteCode, SimpleWriteReview])

    async def _act(self) -> Message:
        logger.info(f"{self._setting}: to do {self.rc.todo}({self.rc.todo.name})")
        todo = self.rc.todo
        code_text = await todo.run(self.get_memories(), k=5)
        return Message(content=code_text, role=self.profile, cause_by=type(todo))


class SimpleWriteReview(Action):
    PROMPT_TEMPLATE: str = "Context: {context} Review the test cases and provide one comment:"
    name: str = "SimpleWriteReview"

    async def run(self, context: str):
        return await self._aask(self.PROMPT_TEMPLATE.format(context=context))


class SimpleReviewer(Role):
    name: str = "Charlie"
    profile: str = "SimpleReviewer"

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.set_actions([SimpleWriteReview])
        self._watch([SimpleWriteTest])


def multi(context, prompt, add_human=False):
    team = Team()
    team.hire([SimpleCoder(), SimpleTester(), SimpleReviewer(is_human=add_human)])
    team.invest(investment=3.0)
    team.run_project(prompt)
    return team


def human(context, prompt):
    return multi(context, prompt, add_human=True)


def debate(context, prompt):
    own = context.config.model_copy(deep=True)
    own.llm.model = "gpt-4-turbo"
    instruction = "Express your opinion with emotion and don't repeat it"
    action1 = Action(name="AlexSay", instruction=instruction, config=own)
    action2 = Action(name="BobSay", instruction=instruction)
    alex = Role(name="Alex", profile="Democrat", goal="Win", actions=[action1], watch=[action2])
    bob = Role(name="Bob", profile="Republican", goal="Win", actions=[action2], watch=[action1])
    team = Team(investment=10.0, env_desc="US election live broadcast", roles=[alex, bob])
    team.run_project(prompt, send_to="Alex")
    return team


class SimpleRunCode(Action):
    name: str = "SimpleRunCode"

    async def run(self, code_text: str):
        return f"ran {len(code_text)} characters"


class RunnableCoder(Role):
    name: str = "Alice"
    profile: str = "RunnableCoder"

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.set_actions([SimpleWriteCode, SimpleRunCode])
        self._set_react_mode(react_mode="by_order")

    async def _act(self) -> Message:
        todo = self.rc.todo
        result = await todo.run(self.get_memories(k=1)[0].content)
        msg = Message(content=result, role=self.profile, cause_by=type(todo))
        self.rc.memory.add(msg)
        return msg


def single(context, prompt):
    return RunnableCoder()


class Ask(Action):
    async def run(self, history):
        from metagpt.actions.di.ask_review import AskReview
        from metagpt.utils.human_interaction import HumanInteraction

        review, confirmed = await AskReview().run(history)
        number = HumanInteraction().input_num_until_valid(3)
        lines = HumanInteraction().multilines_input("Enter your review comment: ")
        self.context.kwargs.run.update(progress=0.7)
        return repr([review, confirmed, number, lines, input("And? ")])


def asks(context, prompt):
    return [Role(name="Ada", actions=[Ask()])]


class Raw(Action):
    async def run(self, history):
        asked = [{"role": "user", "content": str(history)}]
        whole = await self.llm.acompletion(asked)
        code = await self.llm.aask_code(asked)
        return whole.choices[0].message.content + code["code"]


class Late(Action):
    async def run(self, history):
        late = Role(name="Lou", profile="late", actions=[Action(name="LouSay", instruction="x")])
        late._watch([Late])
        self.context.kwargs.team.hire([late])
        return "hired"


def raw(context, prompt):
    team = Team(roles=[Role(name="Ray", profile="raw", actions=[Raw()])])
    team.hire([Role(name="Liz", profile="hires", actions=[Late()])])
    context.kwargs.set("team", team)
    return team


class Form(Action):
    async def run(self, history):
        form = ActionNode(key="Colour", expected_type=str, instruction="Choose", example="red")
        node = ActionNode.from_children("Form", [form])
        return await node.fill(context=str(history), llm=self.llm, schema="json")


def form(context, prompt):
    action = Action(name="Read", instruction="Read it")
    roles = [Role(name="Flo", profile="form", actions=[Form()])]
    return [*roles, Role(name="Rob", profile="reads", actions=[action], watch=[Form])]


def nothing(context, prompt):
    print("a team's own output")


def broken(context, prompt):
    raise ValueError("no such thing")


shared_action = Action(name="Shared", instruction="Say it")


def shared(context, prompt):
    return [Role(name="Sam", actions=[shared_action])]
'''
TEAM_NAMES = (
    *("multi", "human", "debate", "single", "asks", "nothing", "broken", "shared", "raw", "form"),
)


@pytest.fixture(scope="module")
def metagpt(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Client, ModelServer, Process]]:
    """The real engine behind the stand-in model, as `python streamer.py` starts it, shared."""
    folder = tmp_path_factory.mktemp("metagpt")
    git = tmp_path_factory.mktemp("git")
    with model_server() as (model, url):
        environ = {"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": url, **hostile_git(git), **SECRETS}
        command = ["--port", "0", "--max-running", "12", "--allow-run-tests"]
        (teams := tmp_path_factory.mktemp("teams")).joinpath("own_teams.py").write_text(OWN_TEAMS)
        environ |= {"PYTHONPATH": f"{HERE}:{teams}"}
        command += ["--teams", ",".join(f"{name}=own_teams:{name}" for name in TEAM_NAMES)]
        with process(SERVER, *command, cwd=folder, environ=environ) as server:
            yield server.client, model, server
            assert server.stop() == -signal.SIGTERM
    assert sorted(path.name for path in git.iterdir()) == [
        "attributes",
        "config",
        "ignore",
        "template",
    ]


@pytest.fixture
def scripted(tmp_path: Path) -> Iterator[Client]:
    """`python streamer.py --test-mode`, with a team that takes a second an agent."""
    with process(
        "-c", BRISK, "--test-mode", "--port", "0", "--allow-run-tests", cwd=tmp_path
    ) as server:
        yield server.client


def skip_without(what: str) -> NoReturn:
    """Skips a test for what this machine lacks; in CI its absence is a failure."""
    if os.environ.get("CI"):
        pytest.fail(f"{what} is not installed, and CI must have it")
    pytest.skip(f"{what} is not installed")


def needs(tool: str) -> str:
    """The path of a program some tests need."""
    return shutil.which(tool) or skip_without(tool)


def needs_package(name: str) -> None:
    if importlib.util.find_spec(name) is None:
        skip_without(name)


# What some tests need of npm: `npm install --prefix .ci/npm …`, which CI does.
NODE_PACKAGES = {
    "ai": "7.0.173",
    "@ai-sdk/react": "4.0.177",
    "@ag-ui/client": "1.0.0",
    "ag-ui-client-before-1": "npm:@ag-ui/client@0.0.59",
    "@copilotkit/runtime": "1.75.0",
    "@copilotkit/core": "1.75.0",
    "react": "19",
    "react-dom": "19",
    "esbuild": "0",
    "axe-core": "4",
    "@microsoft/fetch-event-source": "2.0.1",
    "eventsource": "4.1.1",
    "express": "5.3.0",
    "compression": "1.8.2",
}


def node_modules() -> Path:
    """Where NODE_PACKAGES are."""
    needs("node")
    modules = HERE / ".ci" / "npm" / "node_modules"
    for name, version in NODE_PACKAGES.items():
        if not (modules / name).is_dir():
            skip_without(f"npm install --prefix .ci/npm {name}@{version}")
    return modules


class Gate:
    """A runner that emits, waits for the test, emits, returns."""

    def __init__(self) -> None:
        self.started = threading.Event()
        self.go = threading.Event()
        self.runs = 0

    def __call__(self, run: Run) -> dict[str, Any]:
        self.runs += 1
        run.emit("MESSAGE", {"message": "before"}, "Engineer")
        self.started.set()
        while not self.go.is_set():
            run.wait(0.01)
        run.emit("MESSAGE", {"message": "after"}, "Engineer")
        return {"answer": 42}


@contextlib.contextmanager
def others_speaking(run: Run, pause: float = 0) -> Iterator[None]:
    """Another role speaks meanwhile, with a pause in seconds before each token."""
    ended = threading.Event()

    def speak() -> None:
        while not ended.wait(pause):
            run.emit("TOKEN", {"message": "blah "}, "Bob")

    threading.Thread(target=speak, daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def burst(count: int) -> Callable[[Run], dict[str, Any]]:
    def runner(run: Run) -> dict[str, Any]:
        for number in range(count):
            run.emit("LOG", {"message": f"line {number}"})
        return {}

    return runner


# -----------------------------------------------------------------------------
# The lock
# -----------------------------------------------------------------------------

# What metagpt 0.8.2 asks for and the lock leaves out or overrides: optional vendors, and pins
# that cannot be met.
OVERRIDDEN = "metagpt"


def locked(**environment: str) -> dict[str, str]:
    """The lock's pins, on another Python or system where `environment` names one (by markers)."""
    lines = (HERE / "requirements.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    used = [pin for pin in pins if pin.marker is None or pin.marker.evaluate(environment)]
    return {str(canonicalize_name(pin.name)): str(pin.specifier)[2:] for pin in used}


@pytest.mark.parametrize("system", ["linux", "darwin"])
@pytest.mark.parametrize("python", ["3.11.0", "3.11.7", "3.12.0", "3.13.0"])
def test_lock_is_complete(python: str, system: str) -> None:
    """Every requirement of every locked package is met by the lock, but for MetaGPT's own pins."""
    here = {"python_full_version": python, "python_version": python[:4], "sys_platform": system}
    pins = locked(**here)
    unmet = []
    for name in sorted(set(locked()) - {OVERRIDDEN}):  # what is installed here says what it needs
        for text in importlib.metadata.requires(name) or []:
            wanted = Requirement(text)
            if wanted.marker is not None and not wanted.marker.evaluate({"extra": "", **here}):
                continue
            version = pins.get(str(canonicalize_name(wanted.name)))
            if version is None or not wanted.specifier.contains(version, prereleases=True):
                unmet.append(f"{name} needs {text}, the lock has {version}")
    assert unmet == []


@pytest.mark.main_path
def test_lock_is_what_is_installed() -> None:
    """These tests run on the versions of the lock."""
    assert {name: importlib.metadata.version(name) for name in locked()} == locked()


TESTING = {"iniconfig", "packaging", "pluggy", "pytest"}  # what only the tests need


def test_lock_is_what_uv_installs() -> None:
    """The script header of streamer.py has the lock's lines, but for what only the tests need."""
    header = re.search(
        r"^# /// script\n(.*?)^# ///$", Path(SERVER).read_text(), re.DOTALL | re.MULTILINE
    )
    assert header is not None
    listed = tomllib.loads(re.sub("^# ?", "", header[1], flags=re.MULTILINE))["dependencies"]
    lines = (HERE / "requirements.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    pins = [pin for pin in pins if pin.url is None and pin.name not in TESTING]
    assert [Requirement(line) for line in listed] == pins


def test_lock_tells_an_older_python_what_it_needs() -> None:
    """On an older Python pip stops at the first line, whose file is not there."""
    lines = (HERE / "requirements.txt").read_text().splitlines()
    first = Requirement(next(line for line in lines if line and not line.startswith("#")))
    assert first.url == "file:///streamer-needs-Python-3.11-3.12-or-3.13"
    assert first.marker is not None
    versions = ["3.8", "3.10", "3.11", "3.13"]
    told = [first.marker.evaluate({"python_version": version}) for version in versions]
    assert told == [True, True, False, False]


def test_uv_runs_the_file_with_nothing_installed(tmp_path: Path) -> None:
    """`uv run streamer.py run "…" --test-mode` installs what it needs and plays the team."""
    command = [
        needs("uv"),
        "run",
        "--quiet",
        "--python",
        sys.executable,
        SERVER,
        "run",
        "Build a todo app",
    ]
    options = ["--test-mode", "--no-implement", "--json"]
    # It may have to download everything.
    ended = subprocess.run(
        [*command, *options], cwd=tmp_path, capture_output=True, timeout=20 * TIMEOUT
    )
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout.splitlines()[-1])["data"]["status"] == "SUCCEEDED"


# Runs a program as if a Python had another version, or lacked packages.
ELSEWHERE = """
import runpy, sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {missing}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
version = {version}
if version:
    sys.version, sys.version_info = version, tuple(map(int, version.split(".")))
sys.meta_path.insert(0, Missing())
sys.stdout.isatty = lambda: True
sys.argv[0] = {server!r}
runpy.run_path({server!r}, run_name="__main__")
"""


def elsewhere(missing: Collection[str] = (), version: str | None = None) -> str:
    return ELSEWHERE.format(missing=set(missing) or "()", version=repr(version), server=SERVER)


@pytest.mark.parametrize("version", ["3.8.18", "3.10.13"])
def test_older_python_is_told_what_to_type(tmp_path: Path, version: str) -> None:
    """It can read the file so far that it says one line, and exits with 2."""
    source = Path(SERVER).read_text()
    ast.parse(source, feature_version=(3, 8))
    assert re.findall(r"\bwith \($", source, re.MULTILINE) == []  # which ast.parse lets pass
    with process("-c", elsewhere(version=version), cwd=tmp_path) as command:
        assert command.wait() == 2
    (line,) = command.errors
    assert line.startswith(
        f"streamer: needs Python 3.11, 3.12 or 3.13, not {version}; type, with the one"
    )
    assert "pip install --no-deps --ignore-requires-python -r requirements.txt" in line


def test_newer_python_is_not_refused(tmp_path: Path) -> None:
    """It is told what was tried, and works."""
    code = "import sys, streamer; sys.version_info = (3, 14, 0); "
    code += "sys.exit(streamer.main(['--version']))"
    with process("-c", code, cwd=tmp_path) as command:
        assert command.wait() == 0
    assert command.errors == ["streamer: tried on Python 3.11, 3.12 and 3.13; this one is newer\n"]
    assert command.output == f"streamer {streamer.__version__}\n".encode()


@pytest.mark.parametrize(
    ("package", "arguments", "problem"),
    [
        ("starlette", [], "No module named 'starlette'"),
        ("httptools", [], "No module named 'httptools'"),
        ("redis", ["--test-mode", "--redis-url", "redis://127.0.0.1:1"], "No module named 'redis'"),
        ("metagpt", [], "MetaGPT is not installed"),
    ],
)
def test_missing_package_is_one_line(
    tmp_path: Path, package: str, arguments: list[str], problem: str
) -> None:
    """It says what to type, and exits with 2."""
    environ = {"OPENAI_API_KEY": KEY}
    with process("-c", elsewhere({package}), *arguments, cwd=tmp_path, environ=environ) as command:
        assert command.wait() == 2
    (line,) = command.errors
    assert line.startswith(f"streamer: {problem}")
    lock = HERE / "requirements.txt"
    install = f"-m pip install --no-deps --ignore-requires-python -r {lock}".split()
    assert shlex.split(line.partition("; type: ")[2])[1:] == install


def test_runner_of_ones_own_needs_three_packages(tmp_path: Path) -> None:
    """starlette, uvicorn[standard], anyio and what they need: nothing else of the lock."""
    needed = {"starlette", "uvicorn", "anyio"}
    for name in itertools.chain.from_iterable(itertools.repeat(sorted(locked()), 5)):
        extra = {"extra": "standard" if name == "uvicorn" else ""}
        wanted = [
            Requirement(text)
            for text in (importlib.metadata.requires(name) or [] if name in needed else [])
        ]
        needed |= {
            str(canonicalize_name(one.name))
            for one in wanted
            if not one.marker or one.marker.evaluate(extra)
        }
    modules = importlib.metadata.packages_distributions()
    others = [
        module
        for module, packages in modules.items()
        if not needed & {str(canonicalize_name(package)) for package in packages}
    ]
    code = f"""
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name in {others}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
import streamer
streamer.logging.basicConfig(level="INFO")
settings = streamer.Settings(port=0)
streamer.serve(streamer.create_app(settings, runner=lambda run: {{"answer": 42}}), settings)
"""
    assert {"metagpt", "openai", "pydantic", "redis", "rich"} <= set(others)
    with process("-c", code, cwd=tmp_path) as server:
        record = server.client.watch(server.client.create())
    assert record.last_state["final_result"] == {"answer": 42}


# -----------------------------------------------------------------------------
# Settings
# -----------------------------------------------------------------------------


def test_settings_flags_win_over_the_environment() -> None:
    """A flag beats a variable, a variable beats the default."""
    environ = {"STREAMER_PORT": "1", "STREAMER_TEST_MODE": "yes", "STREAMER_HEARTBEAT": "2.5"}
    settings = Settings.from_environ(environ, port="2", heartbeat=None)
    assert (settings.port, settings.test_mode, settings.heartbeat, settings.max_running) == (
        2,
        True,
        2.5,
        4,
    )
    assert settings.workspace == Path.cwd() / "workspace"


def test_settings_take_an_empty_variable_as_not_set() -> None:
    """`STREAMER_TOKEN=` in an environment file is no token; an empty flag is one that was given."""
    environ = {"STREAMER_PORT": "", "STREAMER_TEST_MODE": "", "STREAMER_DB": "tasks.db"}
    assert Settings.from_environ(environ, db="") == Settings()
    assert Settings.from_environ(environ).db == "tasks.db"


def test_settings_take_a_price() -> None:
    """Two numbers, of prompt and completion tokens; none by default, and 0 is free."""
    assert Settings.from_environ({"STREAMER_PRICE": "1.25, 10"}).price == (1.25, 10.0)
    assert Settings.from_environ({}, price="0,0").price == (0.0, 0.0)
    assert Settings.from_environ({}).price == ()


def test_settings_tell_of_misspelt_variables(caplog: pytest.LogCaptureFixture) -> None:
    """A variable that is no setting is a warning with the nearest name, not an error."""
    environ = {"STREAMER_PROT": "1", "STREAMER_XYZZY": "1", "STREAMER_PORT": "2", "PATH": "/"}
    assert Settings.from_environ(environ).port == 2
    assert [record.getMessage() for record in caplog.records] == [
        "STREAMER_PROT is unknown (did you mean STREAMER_PORT?)",
        "STREAMER_XYZZY is unknown",
    ]


def test_settings_pass_over_what_kubernetes_sets(caplog: pytest.LogCaptureFixture) -> None:
    """For a Service named streamer, or streamer-redis; no other port that is a URL."""
    environ = {
        "STREAMER_PORT": "tcp://10.0.0.1:8000",
        "STREAMER_PORT_8000_TCP": "tcp://10.0.0.1:8000",
        "STREAMER_PORT_8000_TCP_ADDR": "10.0.0.1",
        "STREAMER_SERVICE_HOST": "10.0.0.1",
        "STREAMER_SERVICE_PORT": "8000",
        "STREAMER_SERVICE_PORT_HTTP": "8000",
        "STREAMER_REDIS_PORT": "tcp://10.0.0.2:6379",
        "STREAMER_REDIS_SERVICE_PORT": "6379",
    }
    assert Settings.from_environ(environ) == Settings()
    assert Settings.from_environ(environ, port="2").port == 2
    assert caplog.records == []
    with pytest.raises(streamer.SettingsError, match="STREAMER_PORT must be a whole number"):
        Settings.from_environ({"STREAMER_PORT": "10.0.0.1:8000"})


@pytest.mark.parametrize(
    ("variable", "text", "complaint"),
    [
        ("STREAMER_PORT", "http", "STREAMER_PORT must be a whole number, not 'http'"),
        ("STREAMER_PRICE", "$5", f"STREAMER_PRICE must be {streamer.PRICE_WORDS}, not '$5'"),
        ("STREAMER_PRICE", "1.25", f"price must be {streamer.PRICE_WORDS}, not 1.25"),
        ("STREAMER_PRICE", "1,nan", f"price must be {streamer.PRICE_WORDS}, not 1.0,nan"),
        ("STREAMER_PRICE", "1,-2", f"price must be {streamer.PRICE_WORDS}, not 1.0,-2.0"),
        ("STREAMER_PORT", "70000", "port must be at most 65535, not 70000"),
        ("STREAMER_PORT", "-1", "port must be a number of at least 0, not -1"),
        ("STREAMER_HEARTBEAT", "soon", "STREAMER_HEARTBEAT must be a number, not 'soon'"),
        ("STREAMER_HEARTBEAT", "nan", "heartbeat must be a number of at least 0.05, not nan"),
        ("STREAMER_GRACE", "inf", "grace must be a number of at least 0.1, not inf"),
        (
            "STREAMER_WORKSPACE",
            "~nobody-here/x",
            "workspace must be a folder, not '~nobody-here/x'",
        ),
        (
            "STREAMER_TEAMS",
            "a=b",
            "teams must be name=module:function,…, each name once, not a=b",
        ),
        (
            "STREAMER_TEAMS",
            "a=b:c,a=d:e",
            "teams must be name=module:function,…, each name once, not a=b:c,a=d:e",
        ),
        ("STREAMER_MAX_RUNNING", "0", "max_running must be a number of at least 1, not 0"),
        ("STREAMER_TEST_MODE", "maybe", "STREAMER_TEST_MODE must be true or false, not 'maybe'"),
        (
            "STREAMER_HOST",
            "0.0.0.0",
            "host '0.0.0.0' can be reached from other machines, so a token is needed",
        ),
    ],
)
def test_settings_name_what_is_wrong(variable: str, text: str, complaint: str) -> None:
    """A value that does not parse, or makes no sense, is an error that names it."""
    with pytest.raises(streamer.SettingsError) as caught:
        Settings.from_environ({variable: text})
    assert str(caught.value).startswith(complaint)


# -----------------------------------------------------------------------------
# Events
# -----------------------------------------------------------------------------


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError("no")


def cycle() -> dict[str, Any]:
    outer: dict[str, Any] = {"message": "m"}
    outer["self"] = outer
    return outer


@pytest.mark.parametrize(
    ("payload", "expected"),
    [
        (
            {"message": "m", "n": math.nan, "i": -math.inf},
            {"message": "m", "n": "nan", "i": "-inf"},
        ),
        ({"message": "a\ud800b"}, {"message": "a?b"}),
        ({"message": "m", "s": {7}}, {"message": "m", "s": [7]}),
        ({"message": "m", "b": b"\xff"}, {"message": "m", "b": "b'\\xff'"}),
        ({"message": "m", "p": Path("x")}, {"message": "m", "p": "PosixPath('x')"}),
        ({"message": "m", ("a", 1): 2}, {"message": "m", "('a', 1)": 2}),
        ({"message": "m", "o": Unprintable()}, {"message": "m", "o": "<Unprintable>"}),
        ({"message": "日本 😀 \u202e"}, {"message": "日本 😀 \u202e"}),
    ],
)
def test_payload_is_made_to_fit_json(payload: dict[str, Any], expected: dict[str, Any]) -> None:
    """What JSON cannot carry becomes text; the rest stays as it is."""
    assert json.loads(streamer.encode_payload(payload, 65536)) == expected


@pytest.mark.parametrize(
    "payload", [cycle(), {"message": "m", "n": 10**6000}, {"message": [[[]]] * 3, "s": Settings}]
)
def test_payload_that_nothing_can_carry_is_still_json(payload: dict[str, Any]) -> None:
    """Cycles, huge integers and classes do not fail an event."""
    assert "message" in json.loads(streamer.encode_payload(payload, 65536))


@pytest.mark.parametrize(
    "payload",
    [
        {"message": "x" * 10_000_000},
        {"message": "😀" * 100_000},
        {"message": "m", "content": "\x01" * 100_000},
        {"message": "m", "list": list(range(100_000))},
        {"message": "m", **{f"key{number}": "v" * 100 for number in range(5000)}},
    ],
)
def test_payload_over_the_limit_is_cut_and_says_so(payload: dict[str, Any]) -> None:
    """An event never takes more than max_event_bytes, and a client can see that it was cut."""
    text = streamer.encode_payload(payload, 4096)
    cut = json.loads(text)
    assert len(text.encode()) <= 4096
    assert cut["truncated"] is True
    assert cut["original_bytes"] == len(streamer.encode(payload).encode())


# -----------------------------------------------------------------------------
# Tasks
# -----------------------------------------------------------------------------


def make_task(status: TaskStatus = TaskStatus.PENDING) -> streamer.Task:
    return streamer.Task(
        id="t", title="t", input_prompt="p", mode="test", options={}, status=status
    )


def test_transitions_outside_the_table_raise() -> None:
    """Of the 25 pairs of states just the eight of the table are allowed."""
    allowed = set()
    for before, after in itertools.product(TaskStatus, TaskStatus):
        with contextlib.suppress(streamer.IllegalTransition):
            allowed.add((before.value, make_task(before).to(after).status.value))
    ends = {("PENDING", "RUNNING"), ("PENDING", "FAILED"), ("PENDING", "CANCELLED")}
    ends |= {("RUNNING", end) for end in ("SUCCEEDED", "FAILED", "CANCELLED")}
    assert allowed == ends | {("FAILED", "PENDING"), ("CANCELLED", "PENDING")}


def test_costs_add_up_and_are_shown() -> None:
    """A part without a price makes the whole one unknown; the budget is the later run's."""
    first = {"prompt_tokens": 1, "completion_tokens": 2, "total_cost": 0.1, "max_budget": 3.0}
    second = {**first, "total_cost": 0.2, "max_budget": 4.0}
    both = {"prompt_tokens": 2, "completion_tokens": 4, "total_cost": 0.3, "max_budget": 4.0}
    assert streamer.add_costs(first, second) == both
    assert streamer.add_costs({**first, "total_cost": None}, second)["total_cost"] is None
    own = {"prompt_tokens": 1, "completion_tokens": 2, "total_cost": 0.1}
    total = streamer.add_costs(
        {**first, "by_role": {"A": own, "B": own}}, {**first, "by_role": {"A": own}}
    )
    twice = {"prompt_tokens": 2, "completion_tokens": 4, "total_cost": 0.2}
    assert total["by_role"] == {"A": twice, "B": own}
    assert streamer.price_text(0.3) == "$0.3000"
    assert streamer.price_text(0.3, 4.0) == "$0.3000 of $4.00"
    assert streamer.price_text(None, 4.0) == "price unknown"


# -----------------------------------------------------------------------------
# Stores: one contract
# -----------------------------------------------------------------------------


def make_draft(number: int, kind: EventType = EventType.LOG) -> streamer.Draft:
    return streamer.Draft(kind, None, streamer.now(), f"m{number}", f'{{"message":"m{number}"}}')


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class RedisServer:
    """A real `redis-server` that can be killed, stopped, and started again on the same data."""

    def __init__(self, folder: Path) -> None:
        with loopback() as bound:
            self.port = bound.getsockname()[1]
        self.folder = folder
        self.url = f"redis://127.0.0.1:{self.port}"
        self.popen: subprocess.Popen[bytes]

    def start(self, *options: str) -> None:
        durable = ["--appendonly", "yes", "--appendfsync", "always", "--save", ""]
        command = [
            needs("redis-server"),
            "--port",
            str(self.port),
            "--dir",
            str(self.folder),
            *durable,
            *options,
        ]
        self.popen = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            if b"Ready to accept connections" in line:
                break
        self._reader = threading.Thread(target=self.popen.stdout.read)
        self._reader.start()

    def kill(self) -> None:
        self.popen.kill()
        self.popen.wait()
        self._reader.join()
        assert self.popen.stdout is not None
        self.popen.stdout.close()

    def __call__(self, *command: str | bytes) -> Any:
        with redis.Redis(port=self.port, decode_responses=True) as client:
            return client.execute_command(*command)


class Proxy:
    """A way to a Redis: what takes it later may come to another one, or what took it to none."""

    def __init__(self, port: int) -> None:
        self.port = port
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._swallowed = 0
        self._listener = loopback()
        self._listener.listen()
        self.url = f"redis://127.0.0.1:{self._listener.getsockname()[1]}"
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # it is closed
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self.port))
                number = len(self._pairs)
                self._pairs.append((near, far))
                for source, target in ((near, far), (far, near)):
                    thread = threading.Thread(target=self._pass_on, args=(number, source, target))
                    self._threads.append(thread)
                    thread.start()

    def _pass_on(self, number: int, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            for data in iter(partial(source.recv, 65536), b""):
                if number >= self._swallowed:
                    target.sendall(data)
            target.shutdown(socket.SHUT_RDWR)

    def swallow(self) -> None:
        """All connections stay, and nothing comes through them any more."""
        self._swallowed = len(self._pairs)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._threads[0].join(TIMEOUT)
        for each in (self._listener, *itertools.chain(*self._pairs)):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(TIMEOUT)
        for each in (self._listener, *itertools.chain(*self._pairs)):
            each.close()


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.kill()


STORES = ("memory", "sqlite", "redis")


@pytest.fixture(params=STORES)
def stored(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    """The settings of each store in turn."""
    if request.param == "redis":
        server: RedisServer = request.getfixturevalue("redis_server")
        server("FLUSHALL")
        return {"redis_url": server.url, "lease": 1.0}
    return {"db": str(tmp_path / "streamer.db")} if request.param == "sqlite" else {}


@contextlib.asynccontextmanager
async def opened(**settings: Any) -> AsyncIterator[Any]:
    store = streamer.open_store(Settings(**settings))
    async with store.opened(lambda error: None):
        yield store


def named(task_id: str, status: TaskStatus = TaskStatus.PENDING) -> streamer.Task:
    return streamer.Task(
        id=task_id,
        title="t",
        input_prompt="日本 \x00 p",
        mode="test",
        options={"a": 1},
        status=status,
    )


def numbered(first: int, count: int, task_id: str = "a") -> list[streamer.Event]:
    return [make_draft(number).numbered(number, task_id) for number in range(first, first + count)]


async def claimed(store: streamer.Store, task_id: str) -> streamer.Claim:
    claim = await store.claim(task_id, set(TaskStatus))
    assert claim is not None
    return claim


async def finish(
    store: streamer.Store, task_id: str, status: TaskStatus = TaskStatus.CANCELLED
) -> None:
    claim = await claimed(store, task_id)
    task, state, _ = claim.record
    ended = dataclasses.replace(task, status=status)
    await claim.write(state._replace(status=status), (), ended)


@pytest.mark.anyio
async def test_store_keeps_what_is_written(stored: dict[str, Any]) -> None:
    """Tasks, states and events come back equal, to the byte."""
    async with opened(**stored) as store:
        assert await store.create(named("a")) == []
        with pytest.raises(streamer.TaskExists):
            await store.create(named("a"))
        task, state, first = await store.load("a")
        assert (task.input_prompt, task.options, state) == (
            "日本 \x00 p",
            {"a": 1},
            streamer.TaskState(task_id="a"),
        )
        assert (list(await store.read("a", 0, 10)), first) == ([], 1)
        assert await store.claim("a", {TaskStatus.RUNNING}) is None
        claim = await store.claim("a", {TaskStatus.PENDING})
        assert claim.record == (task, state, 1)
        assert await store.claim("a", {TaskStatus.PENDING}) is None
        waiting = ("Engineer", "WriteCode", 1.5)
        running = state._replace(
            status=TaskStatus.RUNNING, last_event_id=3, waiting=waiting, progress=0.5
        )
        events = numbered(1, 3)
        await claim.write(running, events, task.to(TaskStatus.RUNNING))
        assert (await store.load("a")).state == running
        assert (await store.load("a")).task.status is TaskStatus.RUNNING
        assert list(await store.read("a", 1, 1)) == events[1:2]
        assert list(await store.read("a", 0, 9)) == events
        await claim.write(running._replace(last_event_id=4), numbered(4, 1))
        assert [event.id for event in await store.read("a", 2, 9)] == [3, 4]
        await store.forget("a")
        with pytest.raises(streamer.TaskNotFound):
            await store.load("a")
        assert list(await store.read("a", 0, 9)) == []
        with pytest.raises(streamer.LeaseLost):
            await claim.write(running, numbered(5, 1))
        assert await store.page(None, 0, 10) == ([], 0)


@pytest.mark.anyio
async def test_store_claim_is_the_right_to_write(stored: dict[str, Any]) -> None:
    """One claim at a time; what was released, or has ended, writes nothing more."""
    async with opened(**stored) as store:
        await store.create(named("a"))
        state = streamer.TaskState(task_id="a", last_event_id=1)
        first = await claimed(store, "a")
        assert await store.claim("a", set(TaskStatus)) is None
        await first.release()
        with pytest.raises(streamer.LeaseLost):
            await first.write(state, numbered(1, 1))
        second = await claimed(store, "a")
        with pytest.raises(streamer.LeaseLost):
            await first.write(state, numbered(1, 1))
        await second.write(state, numbered(1, 1))
        await second.release()
        await finish(store, "a")
        with pytest.raises(streamer.LeaseLost):
            await second.write(state._replace(last_event_id=2), numbered(2, 1))
        assert [event.id for event in await store.read("a", 0, 9)] == [1]


@pytest.mark.anyio
async def test_store_drops_the_oldest_events(stored: dict[str, Any]) -> None:
    """Beyond max_events; the numbers go on, and a reader that lags begins at the oldest kept."""
    async with opened(max_events=10, **stored) as store:
        await store.create(named("a"))
        claim = await claimed(store, "a")
        for batch in range(10):
            state = streamer.TaskState(task_id="a", last_event_id=7 * batch + 7)
            await claim.write(state, numbered(7 * batch + 1, 7))
        assert [event.id for event in await store.read("a", 0, 100)] == list(range(61, 71))
        assert (await store.load("a")).first_event_id == 61


@pytest.mark.anyio
async def test_store_forgets_the_oldest_ended_tasks(stored: dict[str, Any]) -> None:
    """Beyond max_tasks the oldest ended tasks go; tasks that run or wait never do."""
    async with opened(max_tasks=2, **stored) as store:
        await store.create(named("a"))
        await store.create(named("b"))
        claims = [await claimed(store, task_id) for task_id in "ab"]
        with pytest.raises(streamer.TooManyTasks):
            await store.create(named("c"))
        for claim in claims:
            await claim.release()
        await finish(store, "a")
        assert await store.create(named("c")) == ["a"]
        assert [each.id for each in (await store.page(None, 0, 10))[0]] == ["c", "b"]
        await finish(store, "b", TaskStatus.FAILED)
        assert [each.id for each in (await store.page(TaskStatus.FAILED, 0, 10))[0]] == ["b"]
        assert await store.page(None, 1, 1) == ([(await store.load("b")).task], 2)
        assert await store.count() == {TaskStatus.PENDING: 1, TaskStatus.FAILED: 1}


@pytest.mark.anyio
async def test_store_forgets_tasks_that_nobody_starts(stored: dict[str, Any]) -> None:
    """The oldest of them, where they are more than half of all tasks, else the oldest results."""
    async with opened(max_tasks=4, **stored) as store:
        for task_id in "abcd":
            await store.create(named(task_id))
        claim = await claimed(store, "a")
        assert await store.create(named("e")) == ["b"]
        await finish(store, "d")
        assert await store.create(named("f")) == ["d"]
        assert await store.create(named("g")) == ["c"]
        assert [each.id for each in (await store.page(None, 0, 10))[0]] == ["g", "f", "e", "a"]
        await claim.release()


async def start_stored(store: streamer.Store, task_id: str) -> streamer.Claim:
    claim = await claimed(store, task_id)
    task, state, _ = claim.record
    running = state._replace(status=TaskStatus.RUNNING, last_event_id=1)
    await claim.write(running, numbered(1, 1, task_id), task.to(TaskStatus.RUNNING))
    return claim


@pytest.mark.anyio
async def test_store_sweep_finds_orphans(stored: dict[str, Any]) -> None:
    """A run that nobody has a claim to any more can be taken over."""
    async with opened(**stored) as store:
        for name in "ab":
            await store.create(named(name))
        claim = await start_stored(store, "a")
        assert not any(await store.sweep())
        await claim.release()
        with anyio.fail_after(TIMEOUT):
            while list((await store.sweep()).orphans) != ["a"]:
                await store.pause(0.1)
        assert await store.claim("a", {TaskStatus.RUNNING}) is not None
        assert not any(await store.sweep())


@pytest.mark.anyio
async def test_store_forgets_what_is_old(stored: dict[str, Any]) -> None:
    """What nothing was written to for max_age goes, but never a run."""
    async with opened(max_age=1, **stored) as store:
        for name in "ab":
            await store.create(named(name))
        await start_stored(store, "a")
        with anyio.fail_after(TIMEOUT):
            while list((await store.sweep()).expired) != ["b"]:
                await store.pause(0.1)
        assert await store.count() == {TaskStatus.RUNNING: 1}
        assert len(await store.read("a", 0, 9)) == 1


def test_service_is_the_same_on_every_store(tmp_path: Path, stored: dict[str, Any]) -> None:
    """Create, list, watch, replay, page, cancel, run again, delete: what clients see does not tell
    the store.
    """
    gate = Gate()
    with live(gate, tmp_path / "files", max_running=1, **stored) as client:
        body = {"input_prompt": "p", "options": {"n_round": 3}}
        key = {"Idempotency-Key": "k"}
        answers = [client.http.post("/api/tasks", json=body, headers=key) for _ in range(2)]
        assert [answer.status_code for answer in answers] == [201, 200]
        assert answers[0].json() == answers[1].json()
        task_id = answers[0].json()["id"]
        other = client.http.post("/api/tasks", json={"input_prompt": "q"}, headers=key)
        assert other.json()["error"]["code"] == "idempotency_conflict"
        witness = client.follow(task_id)
        waiting = client.create("waits")
        assert gate.started.wait(TIMEOUT)
        assert client.post(f"/api/tasks/{waiting}/run").json()["status"] == "PENDING"
        queue = client.follow(waiting)
        queue.until(lambda state: "waiting for a free slot" in (state["last_message"] or ""))
        assert client.post(f"/api/tasks/{waiting}/cancel").status_code == 202
        assert [event["event_type"] for event in queue.join()] == ["TASK_CANCELLED"]
        assert client.post(f"/api/tasks/{task_id}/run").json()["status"] == "RUNNING"
        gate.go.set()
        seen = witness.join()
        kinds = ["TASK_START", "MESSAGE", "MESSAGE", "RESULT", "TASK_COMPLETE"]
        assert [event["event_type"] for event in seen] == kinds
        assert witness.states[-1]["final_result"] == {"answer": 42}
        assert whole_log(client, task_id) == seen == client.watch(task_id).events
        assert client.watch(task_id, "after=3").ids == [4, 5]
        assert client.watch(task_id, "after=99").data("connected")[0]["recovered"] is False
        page = client.get(f"/api/tasks/{task_id}/events?after=1&limit=2&types=MESSAGE")
        assert ([event["event_id"] for event in page["events"]], page["has_more"]) == ([2, 3], True)
        assert client.get(f"/api/tasks/{task_id}/state") == witness.states[-1]
        assert client.post(f"/api/tasks/{task_id}/run?restart=true").status_code == 409
        assert client.post(f"/api/tasks/{waiting}/run?restart=true").status_code == 202
        assert [event["event_id"] for event in client.watch(waiting).events] == [1, 2, 3, 4, 5, 6]
        assert client.get("/api/tasks?status=SUCCEEDED")["total"] == 2
        assert [item["id"] for item in client.get("/api/tasks")["items"]] == [waiting, task_id]
        assert client.get("/healthz")["tasks"] == {"SUCCEEDED": 2}
        assert client.http.delete(f"/api/tasks/{task_id}").status_code == 204
        assert client.http.get(f"/api/tasks/{task_id}/events").status_code == 404
        assert client.watch(task_id).close_code == 4404


# -----------------------------------------------------------------------------
# Durability: SQLite
# -----------------------------------------------------------------------------

# A server whose runner emits at full speed, or step by step, until it is stopped.
BUSY = """
import logging, sys, streamer
logging.basicConfig(level=logging.INFO)
def runner(run):
    if run.prompt == "ask":
        return {"answer": run.ask("Go on?", ["yes", "no"])}
    pause = float(run.prompt)
    number = 0
    while number < 1_000_000:
        run.emit("TOKEN", {"message": f"token {number} "}, "Engineer")
        run.update(progress=number / 1_000_000)
        number += 1
        if pause:
            run.wait(pause)
        run.check_cancelled()
settings = streamer.Settings.from_environ()
streamer.serve(streamer.create_app(settings, runner=runner), settings)
"""


@contextlib.contextmanager
def busy(folder: Path, **settings: Any) -> Iterator[Process]:
    chosen = {"port": 0, "test_mode": "true", "grace": 1, **settings}
    environ = {f"STREAMER_{name.upper()}": str(value) for name, value in chosen.items()}
    with process("-c", BUSY, cwd=folder, environ=environ) as server:
        yield server


def whole_log(client: Client, task_id: str, after: int = 0) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = []
    while True:
        page = client.get(f"/api/tasks/{task_id}/events?after={after}")
        events += page["events"]
        after = page["last_event_id"]
        if not page["has_more"]:
            return events


def settled(client: Client, task_id: str) -> dict[str, Any]:
    """The task, once it has ended."""
    client.watch(task_id, "start=false")
    return dict(client.get(f"/api/tasks/{task_id}"))


def test_kill_at_any_moment_loses_nothing_that_was_seen(tmp_path: Path) -> None:
    """6 kills of 9 runs each: what a client saw is the log's beginning; each run ends once; what
    waited runs.
    """
    chance = random.Random(5)
    waiting: str | None = None
    before: list[Watcher] = []
    for _ in range(7):
        with busy(tmp_path, db="streamer.db", max_running=9, max_events=10**7) as server:
            client = server.client
            for pair in zip(before[::2], before[1::2], strict=True):
                task_id = pair[0].task_id
                task = settled(client, task_id)
                log = whole_log(client, task_id)
                assert task["status"] == "FAILED"
                assert "interrupted by a restart" in task["result_summary"]
                assert [event["event_id"] for event in log] == list(range(1, len(log) + 1))
                for witness in pair:
                    assert witness.task_id == task_id
                    assert witness.events == log[: len(witness.events)]
                assert [event["event_id"] for event in log if event["event_type"] in TERMINAL] == [
                    len(log)
                ]
            if waiting:  # for a slot, before the kill; it has one now
                runs = client.follow(waiting, "start=false")
                runs.until(lambda state: state["status"] == "RUNNING")
                assert client.post(f"/api/tasks/{waiting}/cancel").status_code == 202
                runs.join()
                assert runs.last_state["status"] == "CANCELLED"
            tasks = [client.create(pause) for pause in (*3 * ("0", "0", "0.001"), "0")]
            waiting = tasks.pop()
            before = [client.follow(task_id) for task_id in tasks for _ in range(2)]
            for witness in before[::2]:
                witness.sees()
            assert client.post(f"/api/tasks/{waiting}/run").status_code == 202
            for witness in before[::2]:
                witness.sees(chance.randrange(1, 200))
            server.stop(signal.SIGKILL)
            for witness in before:
                witness.join()
    assert sum(len(witness.events) for witness in before) > 100


def test_restart_keeps_tasks_and_runs_a_cut_off_one_again(tmp_path: Path) -> None:
    """Finished tasks replay and page as before; a cut-off run goes on in the same log; by hand,
    sqlite3 reads it.
    """
    with busy(tmp_path, db="streamer.db") as server:
        done = server.client.create("0.001")
        with server.client.socket(done) as websocket:
            receive_until(websocket, is_event("TOKEN"))
            server.client.post(f"/api/tasks/{done}/cancel")
            watched(websocket)
        record = server.client.watch(done)
        paged = whole_log(server.client, done)
        task = server.client.get(f"/api/tasks/{done}")
        cut = server.client.create("0.001")
        witness = server.client.follow(cut)
        witness.sees()
        rows = sqlite3.connect(f"file:{tmp_path}/streamer.db?mode=ro", uri=True).execute(
            "SELECT json_extract(data, '$.payload.message') FROM events "
            "WHERE task_id = ? AND event_type = 'TOKEN'",
            (done,),
        )
        assert rows.fetchone() == ("token 0 ",)
        server.stop(signal.SIGKILL)
        witness.join()
    with busy(tmp_path, db="streamer.db") as server:
        assert server.client.watch(done).messages == record.messages
        assert (whole_log(server.client, done), server.client.get(f"/api/tasks/{done}")) == (
            paged,
            task,
        )
        settled(server.client, cut)
        assert server.client.post(f"/api/tasks/{cut}/run").status_code == 409
        assert server.client.post(f"/api/tasks/{cut}/run?restart=true").status_code == 202
        with server.client.socket(cut, f"after={witness.events[-1]['event_id']}") as websocket:
            receive_until(websocket, is_event("TASK_START"))
            server.client.post(f"/api/tasks/{cut}/cancel")
            watched(websocket)
        log = whole_log(server.client, cut)
        assert [event["event_id"] for event in log] == list(range(1, len(log) + 1))
        ends = [
            event["event_type"] for event in log if event["event_type"] in ("TASK_START", *TERMINAL)
        ]
        assert ends == ["TASK_START", "TASK_ERROR", "TASK_START", "TASK_CANCELLED"]


def test_restart_closes_a_question(tmp_path: Path) -> None:
    """A run that was cut off while it asked is FAILED "interrupted", and its question is closed."""
    with busy(tmp_path, db="streamer.db") as server:
        watcher = server.client.follow(server.client.create("ask"))
        question = asked(watcher)
        server.stop(signal.SIGKILL)
        watcher.join()
    with busy(tmp_path, db="streamer.db") as server:
        settled(server.client, watcher.task_id)
        state = server.client.get(f"/api/tasks/{watcher.task_id}/state")
        assert "interrupted" in state["error_message"]
        assert "question" not in state
        assert answer(server.client, watcher.task_id, question, "yes").status_code == 409


def test_restart_runs_what_had_been_started(tmp_path: Path) -> None:
    """A stop that is no kill: what ran is CANCELLED, what waited for its turn waits on, in the
    order of its start; what nobody started, or somebody cancelled, does not run.
    """
    with busy(tmp_path, db="streamer.db", max_running=1) as server:
        client = server.client
        tasks = [client.create("0.01") for _ in range(5)]
        witnesses = [client.follow(tasks[0])]
        witnesses[0].until(lambda state: state["status"] == "RUNNING")
        for task_id in (tasks[3], tasks[1], tasks[4]):
            witnesses.append(client.follow(task_id))
            witnesses[-1].until(
                lambda state: "waiting for a free slot" in (state["last_message"] or "")
            )
        assert client.post(f"/api/tasks/{tasks[4]}/cancel").status_code == 202
        server.stop()
        for witness in witnesses:
            witness.join()
        assert [witness.close_code for witness in witnesses] == [1000, 1001, 1001, 1000]
    with busy(tmp_path, db="streamer.db", max_running=1) as server:
        client = server.client
        assert client.follow(tasks[3]).until(lambda state: state["status"] == "RUNNING")
        statuses = [client.get(f"/api/tasks/{each}")["status"] for each in tasks]
        assert statuses == ["CANCELLED", "PENDING", "PENDING", "RUNNING", "CANCELLED"]
        assert client.get("/healthz")["waiting"] == 1
        assert client.post(f"/api/tasks/{tasks[3]}/cancel").status_code == 202
        assert client.follow(tasks[1]).until(lambda state: state["status"] == "RUNNING")


def test_disk_that_is_full_fails_the_run_and_says_so(tmp_path: Path) -> None:
    """The log cannot be written: the client hears why, nothing succeeds; once there is room, the
    log says so too.
    """
    with busy(tmp_path, db="streamer.db", lease=1) as server:
        task_id = server.client.create("0.001")
        witness = server.client.follow(task_id)
        witness.sees()
        size = max(path.stat().st_size for path in tmp_path.glob("streamer.db*"))
        resource.prlimit(
            server.popen.pid, resource.RLIMIT_FSIZE, (size + 4096, resource.RLIM_INFINITY)
        )
        seen = witness.join()
        error = witness.messages[-1]
        assert error["type"] == "error"
        assert (
            "the run was stopped: the log in streamer.db cannot be used: "
            in error["data"]["message"]
        )
        assert witness.close_code == 1013
        health = server.client.http.get("/healthz")
        assert (health.status_code, health.json()["status"]) == (503, "error")
        refused = server.client.http.post("/api/tasks", json={"input_prompt": "0"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "store_unavailable")
        assert server.client.get(f"/api/tasks/{task_id}")["status"] == "RUNNING"
        state = server.client.get(f"/api/tasks/{task_id}/state")
        assert state["error_message"] == health.json()["store"]
        resource.prlimit(
            server.popen.pid,
            resource.RLIMIT_FSIZE,
            (resource.RLIM_INFINITY, resource.RLIM_INFINITY),
        )
        task = settled(server.client, task_id)
        log = whole_log(server.client, task_id)
        assert task["status"] == "FAILED"
        assert (
            "the run was stopped: the log in streamer.db cannot be used" in task["result_summary"]
        )
        assert log[: len(seen)] == seen
        assert [event["event_id"] for event in log] == list(range(1, len(log) + 1))
        assert server.client.http.get("/healthz").status_code == 200


def test_database_that_somebody_locks_is_waited_for(tmp_path: Path) -> None:
    """A shell's lock holds the log back; one that lasts longer than the lease ends the run, and
    says so.
    """
    with busy(tmp_path, db="streamer.db", lease=1) as server:
        tasks = [server.client.create("0.001") for _ in range(2)]
        with contextlib.closing(
            sqlite3.connect(tmp_path / "streamer.db", isolation_level=None)
        ) as shell:
            for task_id, patience in zip(tasks, (0.3, TIMEOUT), strict=True):
                witness = server.client.follow(task_id)
                witness.sees()
                shell.execute("BEGIN IMMEDIATE")
                lives = witness.lives(patience)
                shell.execute("ROLLBACK")
                if lives:
                    witness.sees(len(witness.events) + 1)
                    server.client.post(f"/api/tasks/{task_id}/cancel")
                    witness.join()
                    assert witness.close_code == 1000
                else:
                    assert "database is locked" in witness.messages[-1]["data"]["message"]
                    assert settled(server.client, task_id)["status"] == "FAILED"
                    assert server.client.get("/healthz")["status"] == "ok"


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (
            lambda path: path.write_bytes(b"no database" * 1000),
            "file is not a database; it is another kind of file",
        ),
        (
            lambda path: path.mkdir(),
            "unable to open database file; its folder must exist and be writable",
        ),
        (
            lambda path: sqlite3.connect(path).executescript("PRAGMA user_version = 7"),
            "schema version 7, and this",
        ),
        (
            lambda path: sqlite3.connect(path).executescript(
                streamer.SqliteStore.SCHEMA
                + "INSERT INTO tasks VALUES (1, 'a', 'PENDING', '', '{}', '{}')"
            ),
            "a task cannot be read, perhaps another version of streamer wrote it",
        ),
        (lambda path: path.with_name("gone").mkdir(), None),
    ],
)
def test_file_that_is_no_database_exits_2(
    tmp_path: Path, spoil: Callable[[Path], Any], says: str | None
) -> None:
    spoil(tmp_path / "some.db")
    name = "some.db" if says else "nowhere/some.db"
    with process(SERVER, "--test-mode", "--port", "0", "--db", name, cwd=tmp_path) as server:
        assert server.wait() == 2
    assert f"streamer: db {tmp_path / name}" in server.errors[-1]
    assert (says or "its folder must exist and be writable") in server.errors[-1]


def test_folder_that_is_read_only_exits_2(tmp_path: Path) -> None:
    """Seen by a user who is not root, whom no permission stops."""
    code = "import os, sys, streamer; os.getuid() or os.setuid(65534); "
    code += "sys.exit(streamer.main(sys.argv[1:]))"
    tmp_path.chmod(0o555)
    with tempfile.TemporaryDirectory() as workspace:  # that the other user reaches
        Path(workspace).chmod(0o777)
        command = ["--test-mode", "--db", str(tmp_path / "x.db"), "--workspace", workspace]
        with process("-c", code, *command, cwd=Path("/")) as server:
            assert server.wait() == 2
    tmp_path.chmod(0o755)
    assert "x.db.lock'; its folder must exist and be writable" in server.errors[-1]


@pytest.mark.anyio
async def test_sqlite_log_that_was_cut_stays_cut(tmp_path: Path) -> None:
    """A server that keeps more events than the one before knows where the log begins."""
    path = str(tmp_path / "streamer.db")
    async with opened(db=path, max_events=10) as store:
        await store.create(named("a"))
        claim = await claimed(store, "a")
        await claim.write(streamer.TaskState(task_id="a", last_event_id=70), numbered(1, 70))
    async with opened(db=path, max_events=1000) as store:
        assert (await store.load("a")).first_event_id == 61
        assert (await claimed(store, "a")).record.first_event_id == 61


@pytest.mark.anyio
async def test_sqlite_writes_that_wait_share_a_transaction(tmp_path: Path) -> None:
    """A task that is being forgotten is neither written to nor claimed meanwhile."""
    names = ["a", "b", "c"]
    async with opened(db=str(tmp_path / "streamer.db")) as store:
        states = {name: streamer.TaskState(task_id=name, last_event_id=1) for name in names}
        for name in names:
            await store.create(named(name))
        claims = {name: await claimed(store, name) for name in names}
        statements: list[str] = []
        store._writer.set_trace_callback(statements.append)
        async with anyio.create_task_group() as group, store._committing:
            for name in names:
                group.start_soon(claims[name].write, states[name], numbered(1, 1))
            group.start_soon(store.forget, "c")
            await anyio.wait_all_tasks_blocked()
            assert await store.claim("c", set(TaskStatus)) is None
            with pytest.raises(streamer.LeaseLost):
                await claims["c"].write(states["c"], numbered(2, 1))
        assert statements.count("BEGIN IMMEDIATE") == 1
        assert [len(await store.read(name, 0, 9)) for name in names] == [1, 1, 0]
        assert [each.id for each in (await store.page(None, 0, 9))[0]] == ["b", "a"]


def test_copies_of_the_files_end_no_lock(tmp_path: Path) -> None:
    """A backup in the same process, then a shell's query: what is stored later is kept."""
    code = "import sqlite3, sys; path = sys.argv[1]; "
    code += "print(sqlite3.connect(path).execute('SELECT id FROM tasks').fetchall())"
    path = tmp_path / "streamer.db"
    copies = tmp_path / "copies"

    def copy_all() -> None:
        shutil.rmtree(copies, ignore_errors=True)
        copies.mkdir()
        for file in tmp_path.glob("streamer.db*"):
            shutil.copy(file, copies)

    def query() -> str:
        return subprocess.check_output([sys.executable, "-c", code, str(path)], text=True)

    async def outlasts_a_copy() -> None:
        async with opened(db=str(path)) as store:
            await store.create(named("a"))
            copy_all()
            assert query() == "[('a',)]\n"
            await store.create(named("b"))
            await store.sweep()
            with pytest.raises(streamer.SettingsError, match="another streamer uses it"):
                streamer.open_store(Settings(db=str(path)))
            copy_all()  # what a crash would leave now

    anyio.run(outlasts_a_copy)
    for folder in (copies, tmp_path):
        with contextlib.closing(sqlite3.connect(folder / path.name)) as db:
            assert db.execute("SELECT id FROM tasks").fetchall() == [("a",), ("b",)]


@pytest.mark.anyio
@pytest.mark.parametrize("end", ["", "-wal", "-shm", ".lock"])
@pytest.mark.parametrize("replaced", [True, False])
async def test_sqlite_file_that_is_gone_makes_the_store_unavailable(
    tmp_path: Path, end: str, replaced: bool
) -> None:
    """What would be lost at the end is not said to be stored, at once and at each sweep."""
    path = tmp_path / f"streamer.db{end}"
    async with opened(db=str(tmp_path / "streamer.db")) as store:
        await store.create(named("a"))
        if replaced:
            shutil.copy(path, tmp_path / "copy")
            (tmp_path / "copy").replace(path)
        else:
            path.unlink()
        why = f"{path.name} was deleted or replaced while it was in use; start the server again"
        with pytest.raises(streamer.StoreUnavailable, match=why):
            await store.create(named("b"))
        with pytest.raises(streamer.StoreUnavailable, match=why):
            await store.sweep()
        assert why in store.error
        assert [task.id for task in (await store.page(None, 0, 9))[0]] == ["a"]


@pytest.mark.anyio
async def test_sqlite_file_that_is_gone_ends_what_runs(tmp_path: Path) -> None:
    """Once a sweep has found it nothing is stored any more; what was refused was not written."""
    path = tmp_path / "streamer.db"
    async with opened(db=str(path)) as store:
        await store.create(named("a"))
        claim = await claimed(store, "a")
        running = named("a", TaskStatus.RUNNING)
        state = streamer.TaskState(task_id="a", status=TaskStatus.RUNNING)
        await claim.write(state._replace(last_event_id=1), numbered(1, 1), running)
        assert len(await store.read("a", 0, 9)) == 1
        path.unlink()
        ended = named("a", TaskStatus.FAILED)
        with pytest.raises(streamer.StoreUnavailable):
            await claim.write(
                state._replace(status=TaskStatus.FAILED, last_event_id=2), numbered(2, 1), ended
            )
        why = store.error
        for _ in range(2):
            with pytest.raises(streamer.StoreUnavailable, match="start the server again"):
                await store.sweep()
            with pytest.raises(streamer.StoreUnavailable, match="start the server again"):
                await claim.write(state._replace(last_event_id=2), numbered(2, 1))
        assert store.error == why
        assert len(await store.read("a", 0, 9)) == 1
        assert store.state_data(state)["error_message"] == why
        done = state._replace(status=TaskStatus.SUCCEEDED)
        assert store.state_data(done)["error_message"] is None


@pytest.mark.anyio
async def test_sqlite_says_who_holds_up_the_log_and_gives_its_space_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(streamer.SqliteStore, "WAL_BYTES", 1 << 20)
    path = tmp_path / "streamer.db"
    async with opened(db=str(path)) as store:
        await store.create(named("a"))
        claim = await claimed(store, "a")
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as shell:
            shell.execute("BEGIN")
            shell.execute("SELECT * FROM tasks").fetchall()
            for first in range(1, 20_000, 2000):
                state = streamer.TaskState(task_id="a", last_event_id=first + 1999)
                await claim.write(state, numbered(first, 2000))
            await store.sweep()
            megabytes = (tmp_path / "streamer.db-wal").stat().st_size >> 20
            assert megabytes > 1
            assert store.warning == (
                f"streamer.db-wal has grown to {megabytes} MB, as another program, perhaps a shell,"
                " reads in a transaction that it does not end"
            )
            assert store.error is None
        await store.sweep()
        assert store.warning is None
        assert (tmp_path / "streamer.db-wal").stat().st_size == 0
        assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]


def test_two_servers_on_one_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "link.db").symlink_to("streamer.db")
    with busy(tmp_path, db="streamer.db") as first:
        assert first.client.get("/healthz")["store"] == "ok"
        for name in ("streamer.db", "link.db"):
            with process(
                SERVER, "--test-mode", "--port", "0", "--db", name, cwd=tmp_path
            ) as second:
                assert second.wait() == 2
            assert "another streamer uses it" in second.errors[-1]


def test_corrupt_page_is_an_error_and_not_a_hole(tmp_path: Path) -> None:
    """Bytes of the log that got lost: a clear 503, a closed stream, and a server that goes on."""
    with busy(tmp_path, db="streamer.db") as server:
        task_id = server.client.create("0.0005")
        witness = server.client.follow(task_id)
        witness.sees(500)
        server.stop()
        witness.join()
    path = tmp_path / "streamer.db"
    with path.open("r+b") as file:
        for page in range(8, path.stat().st_size // 4096, 3):
            file.seek(page * 4096)
            file.write(b"\xff" * 4096)
    with busy(tmp_path, db="streamer.db") as server:
        response = server.client.http.get(f"/api/tasks/{task_id}/events")
        assert (response.status_code, response.json()["error"]["code"]) == (
            503,
            "store_unavailable",
        )
        assert "malformed" in response.json()["error"]["message"]
        record = server.client.watch(task_id)
        assert (record.messages[-1]["data"]["code"], record.close_code) == (
            "store_unavailable",
            1013,
        )
        assert record.ids == list(range(1, len(record.ids) + 1))
        assert server.client.create("0")


# -----------------------------------------------------------------------------
# Replicas: Redis
# -----------------------------------------------------------------------------


@contextlib.contextmanager
def replicas(
    count: int, server: RedisServer, folder: Path, **settings: Any
) -> Iterator[list[Process]]:
    """Servers that share a Redis, emptied before, with a lease that fits a test."""
    server("FLUSHALL")
    with contextlib.ExitStack() as stack:
        chosen = {"redis_url": server.url, "lease": 2, **settings}
        started = [stack.enter_context(busy(folder, **chosen)) for _ in range(count)]
        for each in started:
            assert each.client.get("/healthz")["store"] == "ok"
        yield started


def test_replicas_are_one_service(tmp_path: Path, redis_server: RedisServer) -> None:
    """Three clients come to three replicas at once: one run, the same numbered log live at all, any
    one cancels.
    """
    with replicas(3, redis_server, tmp_path) as servers:
        for round_ in range(5):
            created = servers[round_ % 3].client.http.post(
                "/api/tasks",
                json={"input_prompt": "0.001"},
                headers={"Idempotency-Key": f"round {round_}"},
            )
            task_id = created.json()["id"]
            with ThreadPoolExecutor(3) as pool:
                witnesses = list(
                    pool.map(lambda server, task=task_id: server.client.follow(task), servers)
                )
            for witness in witnesses:
                witness.sees()
                witness.until(lambda state: state["status"] == "RUNNING")
            for server in servers:  # another replica takes a client over where it was
                moved = server.client.follow(
                    task_id, f"after={witnesses[0].events[-1]['event_id']}"
                )
                assert moved.messages[0]["data"]["recovered"]
                witnesses.append(moved)
            running = [server.client.get("/healthz")["running"] for server in servers]
            assert sorted(running) == [0, 0, 1]
            repeated = servers[2].client.http.post(
                "/api/tasks",
                json={"input_prompt": "0.001"},
                headers={"Idempotency-Key": f"round {round_}"},
            )
            assert (repeated.status_code, repeated.json()["id"]) == (200, task_id)
            stranger = servers[(running.index(1) + 1) % 3].client
            assert stranger.post(f"/api/tasks/{task_id}/cancel").status_code == 202
            seen = [witness.join() for witness in witnesses]
            assert seen[0] == seen[1] == seen[2] == whole_log(stranger, task_id)
            assert all(part == seen[0][-len(part) :] for part in seen[3:])
            assert [event["event_id"] for event in seen[0]] == list(range(1, len(seen[0]) + 1))
            assert [event["event_type"] for event in seen[0]].count("TASK_START") == 1
            assert seen[0][-1]["event_type"] == "TASK_CANCELLED"
            assert [witness.states[-1]["status"] for witness in witnesses] == ["CANCELLED"] * 6
            assert [witness.close_code for witness in witnesses] == [1000] * 6
            assert stranger.post(f"/api/tasks/{task_id}/cancel").status_code == 409
            with ThreadPoolExecutor(3) as pool:
                path = f"/api/tasks/{task_id}/run?restart=true"
                answers = list(
                    pool.map(
                        lambda server, path=path: server.client.post(path).status_code, servers
                    )
                )
            assert answers == [202] * 3
            again = stranger.follow(task_id, f"after={seen[0][-1]['event_id']}")
            again.until(lambda state: state["status"] == "RUNNING")
            assert stranger.post(f"/api/tasks/{task_id}/cancel").status_code == 202
            assert [event["event_type"] for event in again.join()].count("TASK_START") == 1
        listed = [server.client.get("/api/tasks")["items"] for server in servers]
        assert listed[0] == listed[1] == listed[2]
        assert len(listed[0]) == 5


def test_replicas_take_one_answer(tmp_path: Path, redis_server: RedisServer) -> None:
    """Of answers through all replicas at once the run gets one; the others are told so."""
    with replicas(2, redis_server, tmp_path) as servers:
        for round_ in range(3):
            client = servers[round_ % 2].client
            task_id = client.create("ask")
            client.post(f"/api/tasks/{task_id}/run")
            watchers = [server.client.follow(task_id, "start=false") for server in servers]
            question = asked(watchers[0])
            assert asked(watchers[1]) == question

            def give(
                number: int, task_id: str = task_id, question: Mapping[str, Any] = question
            ) -> int:
                client = servers[number % 2].client
                return answer(client, task_id, question, "yes").status_code

            with ThreadPoolExecutor(8) as pool:
                assert Counter(pool.map(give, range(8))) == {202: 1, 409: 7}
            assert watchers[0].join() == watchers[1].join()
            assert watchers[1].last_state["final_result"] == {"answer": "yes"}
        assert redis_server("KEYS", "streamer:answers:*") == []


def test_replica_that_is_killed_leaves_nobody_hanging(
    tmp_path: Path, redis_server: RedisServer
) -> None:
    """kill -9 of the one that runs: within the lease the other says FAILED, ends its clients, and
    can run it again.
    """
    with replicas(2, redis_server, tmp_path, max_running=1) as (first, second):
        task_id = first.client.create("0.001")
        queued = first.client.create("0.01")
        assert first.client.post(f"/api/tasks/{task_id}/run").status_code == 202
        witness = second.client.follow(task_id)
        witness.until(lambda state: state["status"] == "RUNNING")
        assert first.client.post(f"/api/tasks/{queued}/run").status_code == 202
        first.stop(signal.SIGKILL)
        seen = witness.join()
        assert (seen[-1]["event_type"], witness.close_code) == ("TASK_ERROR", 1000)
        assert "interrupted" in seen[-1]["payload"]["message"]
        assert [event["event_id"] for event in seen] == list(range(1, len(seen) + 1))
        assert second.client.get(f"/api/tasks/{task_id}")["status"] == "FAILED"
        moved = second.client.follow(
            queued, "start=false"
        )  # what waited for its turn gets one at the other
        moved.until(lambda state: state["status"] == "RUNNING")
        assert second.client.post(f"/api/tasks/{queued}/cancel").status_code == 202
        moved.join()
        assert second.client.post(f"/api/tasks/{task_id}/run?restart=true").status_code == 202
        again = second.client.follow(task_id)
        again.until(lambda state: state["status"] == "RUNNING")
        assert second.client.http.delete(f"/api/tasks/{task_id}").status_code == 204
        again.join()
        assert again.close_code in (
            1000,
            4404,
        )  # whichever it hears first: that it was cancelled, or deleted


def test_replica_that_slept_past_its_lease_is_fenced(
    tmp_path: Path, redis_server: RedisServer
) -> None:
    """SIGSTOP, longer than the lease, SIGCONT: it writes nothing more, its run stops, its clients
    see the end.
    """
    with replicas(2, redis_server, tmp_path) as (first, second):
        task_id = first.client.create("0.001")
        own = first.client.follow(task_id)
        own.sees()
        other = second.client.follow(task_id)
        first.popen.send_signal(signal.SIGSTOP)
        seen = other.join()
        assert seen[-1]["event_type"] == "TASK_ERROR"
        first.popen.send_signal(signal.SIGCONT)
        assert own.join() == seen == whole_log(first.client, task_id)
        assert own.close_code == 1000
        assert first.says(f"task id={task_id} left=")
        health = first.client.get("/healthz")
        assert (health["running"], health["abandoned"]) == (0, 0)
        assert whole_log(second.client, task_id) == seen
        fresh = first.client.follow(first.client.create("0.001"))  # it has a new lease
        fresh.sees()
        assert second.client.post(f"/api/tasks/{fresh.task_id}/cancel").status_code == 202
        fresh.join()


def test_replica_that_is_stopped_hands_over_what_waits(
    tmp_path: Path, redis_server: RedisServer
) -> None:
    """SIGTERM: what ran is CANCELLED, what waited for its turn there gets one at the other; its
    watcher sees it.
    """
    with replicas(2, redis_server, tmp_path, max_running=1) as (first, second):
        task_id = first.client.create("0.001")
        queued = first.client.create("0.01")
        for each in (task_id, queued):
            assert first.client.post(f"/api/tasks/{each}/run").status_code == 202
        witness = second.client.follow(queued, "start=false")
        first.stop()
        witness.until(lambda state: state["status"] == "RUNNING")
        assert settled(second.client, task_id)["status"] == "CANCELLED"
        assert second.client.post(f"/api/tasks/{queued}/cancel").status_code == 202
        witness.join()


def test_replica_that_misses_news_catches_up(tmp_path: Path, redis_server: RedisServer) -> None:
    """Its subscription is cut while clients come and go: nobody misses an event, no run ends."""
    with replicas(2, redis_server, tmp_path) as (first, second):
        task_id = first.client.create("0.001")
        assert first.client.post(f"/api/tasks/{task_id}/run").status_code == 202
        stays = second.client.follow(task_id)
        for _ in range(10):
            with second.client.socket(task_id, "types=AGENT_START") as websocket:
                websocket.recv()
                redis_server("CLIENT", "KILL", "TYPE", "pubsub")
            stays.sees(len(stays.events) + 10)
        assert first.client.post(f"/api/tasks/{task_id}/cancel").status_code == 202
        assert stays.join() == whole_log(second.client, task_id)
        assert "Traceback" not in "".join(first.errors + second.errors)


def test_replica_deletes_what_another_runs(tmp_path: Path, redis_server: RedisServer) -> None:
    """The run stops, its clients everywhere are told, and its files go."""
    with replicas(2, redis_server, tmp_path) as servers:
        first, second = (server.client for server in servers)
        task_id = first.create("0.001")
        assert first.post(f"/api/tasks/{task_id}/run").status_code == 202
        witnesses = [client.follow(task_id) for client in (first, second)]
        for witness in witnesses:
            witness.until(lambda state: state["status"] == "RUNNING")
        folder = tmp_path / "workspace" / task_id
        folder.mkdir(parents=True)
        assert second.http.delete(f"/api/tasks/{task_id}").status_code == 204
        for witness in witnesses:
            # Its last event and the deletion race to it; the event comes with the run's end.
            ended = [event["event_type"] for event in witness.join()][-1:] == ["TASK_CANCELLED"]
            assert witness.close_code == (1000 if ended else 4404)
        assert not folder.exists()
        assert servers[0].says(f"task id={task_id} ")
        for client in (first, second):
            assert client.http.get(f"/api/tasks/{task_id}").status_code == 404
        assert redis_server("KEYS", f"*{task_id}*") == [f"streamer:deleted:{task_id}"]


@pytest.mark.parametrize("lease", [60, 1])
def test_redis_goes_away_and_comes_back(
    tmp_path: Path, redis_server: RedisServer, lease: int
) -> None:
    """Within the lease the run goes on; beyond it the run ends, and its clients hear why."""
    with replicas(2, redis_server, tmp_path, lease=lease) as (first, second):
        task_id = first.client.create("0.001")
        own = first.client.follow(task_id)
        own.sees()
        other = second.client.follow(task_id)
        other.sees()
        redis_server.kill()
        try:
            shown = own.until(lambda state: "cannot be reached" in (state["error_message"] or ""))
            assert shown["status"] == "RUNNING"
            if lease == 1:
                own.join()
            health = first.client.http.get("/healthz")
            assert (health.status_code, health.json()["status"]) == (503, "error")
        finally:
            redis_server.start()
        if lease == 60:
            own.sees(len(own.events) + 100)
            assert second.client.post(f"/api/tasks/{task_id}/cancel").status_code == 202
            log = own.join()
            assert (log, own.close_code) == (other.join(), 1000)
            assert own.states[-1]["error_message"] is None
        else:
            assert own.close_code == 1013
            reason = own.messages[-1]["data"]["message"]
            assert reason.startswith("the run was stopped: the Redis at redis://127.0.0.1")
            assert settled(second.client, task_id)["status"] == "FAILED"
            log = other.join()
            assert log[: len(own.events)] == own.events
        whole = whole_log(second.client, task_id)
        assert log == whole[: len(log)]
        assert [event["event_id"] for event in whole] == list(range(1, len(whole) + 1))


@pytest.mark.anyio
async def test_redis_cancel_is_what_the_holder_answers(redis_server: RedisServer) -> None:
    """True once the holder does it, told until then; False where the run ended before, or nobody
    has it.
    """
    redis_server("FLUSHALL")
    shared: dict[str, Any] = {"redis_url": redis_server.url, "lease": 1.0}
    async with opened(**shared) as holder, opened(**shared) as other:
        for name in "ab":
            await holder.create(named(name))
        assert await other.cancel("a") is False
        claim = await claimed(holder, "a")
        told: list[streamer.ClaimMessage] = []

        def listener(message: streamer.ClaimMessage) -> bool:
            told.append(message)
            return len(told) == 2

        claim.listen(listener)
        ending = await start_stored(holder, "b")
        ending.listen(lambda message: False)
        found: dict[str, bool] = {}

        async def cancel(task_id: str) -> None:
            found[task_id] = await other.cancel(task_id)

        async with anyio.create_task_group() as group:
            group.start_soon(cancel, "a")
            group.start_soon(cancel, "b")
            with anyio.fail_after(TIMEOUT):
                while len(told) < 2:
                    await holder.pause(0.1)
                    await holder.sweep()
            task, state, _ = await holder.load("b")
            ended = state._replace(status=TaskStatus.SUCCEEDED)
            await ending.write(ended, (), task.to(TaskStatus.SUCCEEDED))
        assert found == {"a": True, "b": False}
        assert told == [streamer.CancelAsked(), streamer.CancelAsked()]


def test_redis_that_is_back_in_an_older_state_ends_the_run(tmp_path: Path) -> None:
    """SAVE, kill -9 later, start: whoever watches hears why, the run is FAILED with that reason,
    and the log has no hole.
    """
    server = RedisServer(tmp_path)
    durable = ("--appendonly", "no")
    server.start(*durable)
    try:
        with replicas(2, server, tmp_path, lease=10) as (first, second):
            task_id = first.client.create("0.01")
            own = first.client.follow(task_id)
            own.sees(20)
            other = second.client.follow(task_id)
            server("SAVE")
            other.sees(50)
            server.kill()
            server.start(*durable)
            seen = own.join()
            other.join()
            task = settled(second.client, task_id)
            log = whole_log(second.client, task_id)
            again = first.client.watch(task_id, f"after={len(seen)}")
    finally:
        server.kill()
    assert [own.close_code, other.close_code] == [1013, 1013]
    found = re.fullmatch(
        r"the run was stopped: Redis has lost what was stored: it is at event (\d+), of (\d+) that "
        r"were stored; connect again with after=\2",
        own.messages[-1]["data"]["message"],
    )
    assert found is not None, own.messages[-1]
    older, newest = map(int, found.groups())
    assert newest == len(seen)
    assert "the store has lost what was stored" in other.messages[-1]["data"]["message"]
    assert task["status"] == "FAILED"
    assert task["result_summary"].startswith("the run was stopped: Redis has lost what was stored")
    assert log[:-1] == seen[:older]
    assert (log[-1]["event_id"], log[-1]["event_type"]) == (older + 1, "TASK_ERROR")
    assert again.data("connected")[0]["recovered"] is False
    assert again.events == log


LOST = "the store has lost it (flushed, evicted, past max_age, or gone in a failure)"


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("damage", "error", "reason"),
    [
        ("DEL streamer:log:a", "StoreUnavailable", "at event 0, of 3 that were"),
        ("XDEL streamer:log:a 3-0", "StoreUnavailable", "at event 2, of 3 that were"),
        ("HDEL streamer:task:a owner", "StoreUnavailable", "at event 3, of 3 that were"),
        ("XADD streamer:log:a 4-0 type LOG data {}", "StoreUnavailable", "at event 4, and 3 were"),
        ("XADD streamer:log:a 9-5 foo bar", "StoreUnavailable", "at event 9, and 3 were"),
        ("HSET streamer:task:a owner x", "LeaseLost", "another took it over"),
        ("DEL streamer:task:a", "LeaseLost", LOST),
        ("FLUSHALL", "LeaseLost", LOST),
    ],
)
async def test_redis_write_follows_what_is_stored(
    redis_server: RedisServer, damage: str, error: str, reason: str
) -> None:
    """Anything else is refused, with what was found; who claims it then goes on from there."""
    redis_server("FLUSHALL")
    async with opened(redis_url=redis_server.url, lease=1.0) as store:
        await store.create(named("a"))
        claim = await claimed(store, "a")
        state = streamer.TaskState(task_id="a", last_event_id=3)
        await claim.write(state, numbered(1, 3))
        redis_server(*damage.split())
        with pytest.raises(streamer.StreamerError, match=re.escape(reason)) as refused:
            await claim.write(state._replace(last_event_id=4), numbered(4, 1))
        assert type(refused.value).__name__ == error
        with pytest.raises(streamer.StreamerError, match=re.escape(reason)):
            await claim.write(state._replace(last_event_id=4), numbered(4, 1))
        if error == "LeaseLost":
            return
        before = [event.id for event in await store.read("a", 0, 9)]
        claim = await claimed(store, "a")
        added = re.search(r"XADD \S+ (\d)", damage)
        last = int(added[1]) if added else 3
        assert claim.record.state.last_event_id == last
        await claim.write(state._replace(last_event_id=last + 1), numbered(last + 1, 1))
        kept = [event.id for event in await store.read("a", last if before else 0, 9)]
        assert kept == [last + 1]
        assert (await store.load("a")).first_event_id == [*before, last + 1][0]


@pytest.mark.anyio
@pytest.mark.parametrize(("command", "stored"), [("xadd", 3), ("hset", 5), ("publish", 5)])
async def test_redis_that_refuses_a_part_of_a_write_leaves_no_hole(
    redis_server: RedisServer, command: str, stored: int
) -> None:
    """What is counted as stored is in the log, and who claims the task goes on right behind it."""
    redis_server("FLUSHALL")
    async with opened(redis_url=redis_server.url, lease=60.0) as store:
        await store.create(named("a"))
        claim = await claimed(store, "a")
        state = streamer.TaskState(task_id="a", last_event_id=3)
        await claim.write(state, numbered(1, 3))
        redis_server("ACL", "SETUSER", "default", f"-{command}")
        try:
            with pytest.raises(streamer.StoreUnavailable, match="refused: "):
                await claim.write(state._replace(last_event_id=5), numbered(4, 2))
        finally:
            redis_server("ACL", "SETUSER", "default", f"+{command}")
        await claim.release()
        claim = await claimed(store, "a")
        assert (claim.record.state.last_event_id, claim.log_end) == (stored, stored)
        await claim.write(state._replace(last_event_id=stored + 1), numbered(stored + 1, 1))
        log = await store.read("a", 0, 9)
        assert [event.id for event in log] == list(range(1, stored + 2))


def test_redis_data_of_a_stranger_is_a_fault_of_one_task(
    tmp_path: Path, redis_server: RedisServer
) -> None:
    """A log's foreign entry ends its run and its readers with the reason; a record that cannot be
    read is left out of the list.
    """
    redis_server("FLUSHALL")
    with replicas(2, redis_server, tmp_path) as (first, second):
        task_id = first.client.create("0.01")
        witnesses = [first.client.follow(task_id), second.client.follow(task_id)]
        for witness in witnesses:
            witness.sees(5)
        entry = redis_server("XADD", f"streamer:log:{task_id}", "*", "foo", "bar")
        for witness in witnesses:
            witness.join()
            assert witness.messages[-1]["data"]["code"] == "store_unavailable"
            assert witness.close_code == 1013
        ended = settled(second.client, task_id)
        assert "it is at event" in ended["result_summary"]
        log = f"streamer:log:{task_id}"
        reason = f"entry {entry} of {log} is no event of a streamer's: delete the task"
        page = first.client.get(f"/api/tasks/{task_id}/events")
        rest = first.client.http.get(f"/api/tasks/{task_id}/events?after={page['last_event_id']}")
        assert rest.status_code == 503
        assert rest.json()["error"] == {"code": "store_unavailable", "message": reason}
        broken = first.client.create()
        redis_server("HSET", f"streamer:task:{broken}", "task", b"nonsense\xff")
        tasks = first.client.get("/api/tasks")
        assert ([task["id"] for task in tasks["items"]], tasks["total"]) == ([task_id], 2)
        assert first.says(f"task id={broken} unlisted='a task cannot be read")
        assert first.client.http.get(f"/api/tasks/{broken}").status_code == 503
        assert not any("Traceback" in line for each in (first, second) for line in each.errors)


def test_redis_log_with_a_hole_is_read_around_it(tmp_path: Path, redis_server: RedisServer) -> None:
    """A reader is told what is missing, and goes on behind it; a log that is gone is no riddle."""
    redis_server("FLUSHALL")
    with live(burst(50), tmp_path, redis_url=redis_server.url) as client:
        task_id = client.create()
        log = client.watch(task_id).events
        for number in range(11, 21):
            redis_server("XDEL", f"streamer:log:{task_id}", f"{number}-0")
        missing = "events 11 to 20 are missing in the log; the stream goes on behind them"
        for query in ("", "types=LOG,TASK_START,RESULT,TASK_COMPLETE"):
            whole = client.watch(task_id, query)
            assert (whole.events, whole.close_code) == (log[:10] + log[20:], 1000)
            assert whole.data("error") == [{"code": "events_missing", "message": missing}]
            kinds = [message["type"] for message in whole.messages]
            assert kinds.index("error") == kinds.index("event") + 10
        for after in (10, 15):
            rest = client.watch(task_id, f"after={after}")
            greeting = rest.data("connected")[0]
            assert (greeting["recovered"], greeting["first_event_id"]) == (False, 21)
            assert (rest.events, rest.close_code) == (log[20:], 1000)
        assert client.watch(task_id, "after=20").data("connected")[0]["recovered"] is True
        path = f"/api/tasks/{task_id}/events"
        resume = {"Accept": "text/event-stream", "Last-Event-ID": "10"}
        stream = client.http.get(path, headers=resume).text
        assert re.findall(r"^id: (\d+)", stream, re.MULTILINE) == [str(n) for n in range(21, 54)]
        stream = client.http.get(path, headers={"Accept": "text/event-stream"}).text
        found = re.findall(r"^id: (?:10|21)$|events_missing", stream, re.MULTILINE)
        assert found == ["id: 10", "events_missing", "id: 21"]
        pages = [client.get(f"{path}?after={after}") for after in (0, 10, 15, 20)]
        assert [page.get("missing") for page in pages] == [None, [11, 20], [16, 20], None]
        assert [page["last_event_id"] for page in pages] == [10, 53, 53, 53]
        assert whole_log(client, task_id) == log[:10] + log[20:]
        redis_server("DEL", f"streamer:log:{task_id}")
        assert client.get(path) == {
            "events": [],
            "last_event_id": 53,
            "has_more": False,
            "missing": [1, 53],
        }
        for after in (0, 30):
            gone = client.watch(task_id, f"after={after}")
            greeting = gone.data("connected")[0]
            assert (greeting["recovered"], greeting["first_event_id"]) == (False, 54)
            assert (gone.events, gone.close_code) == ([], 1000)
            assert gone.last_state["status"] == "SUCCEEDED"


@pytest.mark.anyio
async def test_redis_record_that_is_lost_leaves_nothing_behind(redis_server: RedisServer) -> None:
    """A task of the same id begins with an empty log; a list that is gone is made again."""
    redis_server("FLUSHALL")
    shared: dict[str, Any] = {"redis_url": redis_server.url, "lease": 1.0}
    async with opened(**shared) as store:
        await store.create(named("a"))
        await start_stored(store, "a")
        redis_server("DEL", "streamer:task:a")
        await store.sweep()
        await store.create(named("a"))
        assert list(await store.read("a", 0, 9)) == []
        claim = await start_stored(store, "a")
        redis_server("DEL", "streamer:tasks", "streamer:tasks:RUNNING")
        state = claim.record.state._replace(status=TaskStatus.FAILED, last_event_id=2)
        await claim.write(state, numbered(2, 1), named("a", TaskStatus.FAILED))
        assert [task.id for task in (await store.page(None, 0, 9))[0]] == ["a"]


def test_redis_that_was_flushed_keeps_the_files(tmp_path: Path, redis_server: RedisServer) -> None:
    """FLUSHALL in mid-run: its clients and the log hear that the store lost the task; nothing was
    deleted.
    """
    with replicas(2, redis_server, tmp_path) as (first, second):
        task_id = first.client.create("0.001")
        waiting = first.client.create("0.001")
        folder = tmp_path / "workspace" / task_id
        folder.mkdir(parents=True)
        witnesses = [server.client.follow(task_id) for server in (first, second)]
        witnesses.append(second.client.follow(waiting, "start=false"))
        for witness in witnesses[:2]:
            witness.sees()
        redis_server("FLUSHALL")
        for witness in witnesses:
            witness.join()
            lost = f"task {witness.task_id} not found: {LOST}; its files are kept"
            assert witness.messages[-1]["data"] == {"code": "task_not_found", "message": lost}
            assert witness.close_code == 4404
        assert first.says(f"task {task_id} is not this replica's any more: {LOST}")
        assert folder.exists()
        assert first.client.get("/healthz")["running"] == 0


# A replica says once a second how far it is, for which FAILOVER holds writes back.
@pytest.mark.parametrize("lease", [20, 4])
def test_redis_that_is_demoted_is_away(tmp_path: Path, lease: int) -> None:
    """A primary becomes a replica while connections stay: within the lease the run goes on at the
    one that took its place; beyond it the run ends, and says why.
    """
    with contextlib.ExitStack() as stack:
        servers = [RedisServer(tmp_path / name) for name in "ab"]
        for server in servers:
            server.folder.mkdir()
            server.start()
            stack.callback(server.kill)
        old, new = servers
        new("REPLICAOF", "127.0.0.1", str(old.port))
        proxy = Proxy(old.port)
        stack.callback(proxy.close)
        chosen: dict[str, Any] = {"redis_url": proxy.url, "lease": lease}
        first, second = (stack.enter_context(busy(tmp_path, **chosen)) for _ in range(2))
        task_id = first.client.create("0.001")
        own = first.client.follow(task_id)
        own.sees()
        other = second.client.follow(task_id)
        other.sees()
        wait_until(lambda: new("INFO", "replication")["master_link_status"] == "up")
        old("FAILOVER")  # once the other one has all that was written
        if lease == 20:
            own.until(lambda state: "takes no writes" in (state["error_message"] or ""))
        else:
            own.join()
            reason = own.messages[-1]["data"]["message"]
            assert reason.startswith("the run was stopped: the Redis at redis://127.0.0.1")
            assert "takes no writes" in reason
        health = first.client.http.get("/healthz")
        assert (health.status_code, "takes no writes" in health.json()["store"]) == (503, True)
        proxy.port = new.port
        if lease == 20:
            count = len(own.events) + 100
            for witness in (own, other):
                witness.sees(count)
            assert second.client.post(f"/api/tasks/{task_id}/cancel").status_code == 202
            log = own.join()
            assert (log, own.close_code) == (other.join(), 1000)
        else:
            assert settled(second.client, task_id)["status"] == "FAILED"
            log = other.join()
            assert log[: len(own.events)] == own.events
        wait_until(lambda: first.client.http.get("/healthz").status_code == 200)
        assert whole_log(first.client, task_id) == log
        assert [event["event_id"] for event in log] == list(range(1, len(log) + 1))


@pytest.mark.anyio
async def test_redis_news_come_again_where_the_way_was_swallowed(redis_server: RedisServer) -> None:
    """A subscription that stays, and that nothing comes through, is made anew."""

    def subscribers() -> set[str]:
        clients = str(redis_server("CLIENT", "LIST", "TYPE", "pubsub"))
        return set(re.findall(r"^id=(\d+)", clients, re.MULTILINE))

    redis_server("FLUSHALL")
    proxy = Proxy(redis_server.port)
    try:
        async with opened(redis_url=proxy.url, lease=0.5) as store:
            with anyio.fail_after(TIMEOUT):
                while not subscribers():
                    await store.pause(0.05)
                before = subscribers()
                end = time.monotonic() + 2 * 0.5
                while time.monotonic() < end:
                    await store.sweep()
                    assert subscribers() == before
                    await store.pause(0.05)
                proxy.swallow()
                while not subscribers() - before:
                    await store.pause(0.05)
    finally:
        proxy.close()


def test_redis_that_evicts_is_warned_of(tmp_path: Path, redis_server: RedisServer) -> None:
    """In the log and in /healthz, by the setting's name; what Redis keeps is as good as ever."""
    redis_server("CONFIG", "SET", "maxmemory-policy", "volatile-lru")
    try:
        with busy(tmp_path, redis_url=redis_server.url) as server:
            health = server.client.get("/healthz")
            warning = "has maxmemory-policy volatile-lru: when its memory is full it drops tasks"
            assert (health["status"], warning in health["store"]) == ("ok", True)
            assert server.says(warning)
    finally:
        redis_server("CONFIG", "SET", "maxmemory-policy", "noeviction")


@pytest.mark.anyio
async def test_redis_replica_lives_while_it_says_so(redis_server: RedisServer) -> None:
    """What Redis lost of it does not end its runs; when it says nothing any more they are
    orphans, and at once when it left.
    """
    redis_server("FLUSHALL")
    shared: dict[str, Any] = {"redis_url": redis_server.url, "lease": 0.5}
    async with opened(**shared) as other:
        async with opened(**shared) as store:
            await store.create(named("a"))
            claim = await start_stored(store, "a")
            end = time.monotonic() + 4 * 0.5
            while time.monotonic() < end:
                redis_server("DEL", "streamer:replicas")
                assert list((await other.sweep()).orphans) == []
                assert await other.claim("a", {TaskStatus.RUNNING}) is None
                await store.sweep()
                assert list((await other.sweep()).orphans) == []
                await other.pause(0.05)
            state = claim.record.state._replace(status=TaskStatus.RUNNING, last_event_id=2)
            await claim.write(state, numbered(2, 1))
            redis_server("DEL", "streamer:replicas")
            with anyio.fail_after(TIMEOUT):
                while list((await other.sweep()).orphans) != ["a"]:
                    await other.pause(0.05)
            await store.sweep()
            assert list((await other.sweep()).orphans) == []
        assert list((await other.sweep()).orphans) == ["a"]
        assert redis_server("HLEN", "streamer:replicas") == 2
        assert await other.claim("a", {TaskStatus.RUNNING}) is not None
        await other.sweep()
        assert redis_server("HLEN", "streamer:replicas") == 1


@pytest.mark.anyio
async def test_redis_cancel_races_success_on_another_replica(
    tmp_path: Path, redis_server: RedisServer
) -> None:
    """96 times: what is acknowledged there is CANCELLED here; what is refused has ended."""
    redis_server("FLUSHALL")
    settings = Settings(workspace=tmp_path, test_mode=True, redis_url=redis_server.url, lease=2.0)
    chance = random.Random(7)

    def runner(run: Run) -> dict[str, Any]:
        run.wait(float(run.prompt))
        return {}

    first, second = (
        streamer.Supervisor(settings, streamer.RedisStore(settings), runner) for _ in range(2)
    )
    ends = Counter[tuple[str, str]]()

    async def race(seconds: float) -> None:
        task, _ = await first.submit(str(seconds), "t", streamer.parse_options({}, 60))
        async with first.watch(task.id) as subscription:
            await first.start(task.id)
            await anyio.sleep(chance.random() * 0.06)
            answer = "accepted"
            try:
                await second.cancel(task.id)
            except streamer.TaskEnded:
                answer = "refused"
            kinds = [event.type async for delivery in subscription for event in delivery.events]
        ends[answer, next(kind for kind in kinds if kind in TERMINAL)] += 1

    async with first.open(), second.open():
        for _ in range(12):
            async with anyio.create_task_group() as group:
                for _ in range(8):
                    group.start_soon(race, chance.random() * 0.1)
    assert set(ends) == {("accepted", "TASK_CANCELLED"), ("refused", "TASK_COMPLETE")}
    assert sum(ends.values()) == 96


@pytest.mark.anyio
async def test_redis_cancel_of_what_is_handed_back(
    tmp_path: Path, redis_server: RedisServer
) -> None:
    """A replica stops while what waits there is cancelled through either: answered is done."""
    redis_server("FLUSHALL")
    settings = Settings(
        workspace=tmp_path, test_mode=True, redis_url=redis_server.url, lease=1.0, max_running=1
    )
    gate = Gate()
    accepted: list[str] = []

    async def cancel(supervisor: streamer.Supervisor, task_id: str) -> None:
        with contextlib.suppress(
            streamer.StoreUnavailable, streamer.ServerClosing, streamer.TaskEnded
        ):
            await supervisor.cancel(task_id)
            accepted.append(task_id)

    first = streamer.Supervisor(settings, streamer.RedisStore(settings), gate)
    second = streamer.Supervisor(settings, streamer.RedisStore(settings), lambda run: {})
    options = streamer.parse_options({}, 60)
    async with second.open():
        async with anyio.create_task_group() as group, first.open():
            ids = [(await first.submit("p", "t", options))[0].id for _ in range(12)]
            for task_id in ids:
                await first.start(task_id)
            for number, task_id in enumerate(ids[1:]):
                group.start_soon(cancel, (first, second)[number % 2], task_id)
                if number == 5:
                    group.start_soon(first.close)
        ends = {}
        for task_id in ids:
            async with second.watch(task_id) as subscription:
                async for _ in subscription:
                    pass
            ends[task_id] = (await second.get(task_id)).status
    assert {ends[task_id] for task_id in accepted} == {TaskStatus.CANCELLED}
    assert accepted


@pytest.mark.anyio
async def test_redis_claim_of_a_replica_that_slept_is_lost(redis_server: RedisServer) -> None:
    """Its holder is told at its next sweep, and writes nothing more."""
    redis_server("FLUSHALL")
    shared: dict[str, Any] = {"redis_url": redis_server.url, "lease": 0.5}
    async with opened(**shared) as slept, opened(**shared) as other:
        await slept.create(named("a"))
        claim = await claimed(slept, "a")
        told: list[streamer.ClaimMessage] = []

        def listener(message: streamer.ClaimMessage) -> bool:
            told.append(message)
            return True

        claim.listen(listener)
        taken = None
        with anyio.fail_after(TIMEOUT):
            while taken is None:
                await other.pause(0.05)
                await other.sweep()
                taken = await other.claim("a", {TaskStatus.PENDING})
        await slept.sweep()
        assert [type(message) for message in told] == [streamer.ClaimLost]
        with pytest.raises(streamer.LeaseLost):
            await claim.write(streamer.TaskState(task_id="a", last_event_id=1), numbered(1, 1))
        await taken.write(streamer.TaskState(task_id="a", last_event_id=1), numbered(1, 1))


def test_redis_that_is_absent_or_refuses_exits_2(tmp_path: Path, redis_server: RedisServer) -> None:
    """The error names the URL, never its password."""
    with loopback() as free:
        absent = f"127.0.0.1:{free.getsockname()[1]}"
    wrong = f"127.0.0.1:{redis_server.port}"
    redis_server("ACL", "SETUSER", "bob", "on", ">right-password", "~*", "&*", "+@all")
    cases = {
        f"redis://:swordfish1@{absent}/3": f"{absent}/3 cannot be used: Error 111",
        f"redis://bob:swordfish1@{wrong}": f"{wrong} cannot be used: invalid username-password",
        "redis://:sword/fish1@127.0.0.1": "redis_url must be redis://",
        "swordfish1": "redis_url must be redis://",
    }
    for url, says in cases.items():
        with process(
            SERVER, "--test-mode", "--port", "0", "--redis-url", url, cwd=tmp_path
        ) as server:
            assert server.wait() == 2
        assert says in server.errors[-1], server.errors
        assert "fish1" not in "".join(server.errors)


def test_redis_that_is_full_ends_the_run(tmp_path: Path, redis_server: RedisServer) -> None:
    with replicas(1, redis_server, tmp_path) as (server,):
        witness = server.client.follow(server.client.create("0.001"))
        witness.sees()
        redis_server("CONFIG", "SET", "maxmemory", "1")
        try:
            witness.join()
        finally:
            redis_server("CONFIG", "SET", "maxmemory", "0")
        assert "command not allowed when used memory" in witness.messages[-1]["data"]["message"]
        assert settled(server.client, witness.task_id)["status"] == "FAILED"


def test_redis_keys_are_few_and_go(tmp_path: Path, redis_server: RedisServer) -> None:
    """A hash and a stream a task, two lists of them, the replicas; after 100 tasks as many as
    max_tasks allows.

    That is five times max_tasks; nothing stays of the 80 that went, as each key's size is exact.
    """
    redis_server("FLUSHALL")
    with live(
        burst(20), tmp_path, redis_url=redis_server.url, max_tasks=20, max_events=10, max_age=1000
    ) as client:

        def play(_: int) -> None:
            client.watch(client.create())

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(play, range(100)))
        keys = redis_server("KEYS", "*")
        assert {key.split(":")[0] for key in keys} == {"streamer"}
        assert Counter(key.split(":")[1] for key in keys) == {
            "task": 20,
            "log": 20,
            "tasks": 2,
            "replicas": 1,
            "deleted": 80,
        }
        expiring = [key for key in keys if key.split(":")[1] in ("task", "log", "deleted")]
        assert all(0 < redis_server("TTL", key) <= 1000 for key in expiring)
        size = {"task": "HLEN", "log": "XLEN", "tasks": "ZCARD"}
        kinds = [(key.split(":")[1], key) for key in keys if key.split(":")[1] in size]
        assert Counter((kind, redis_server(size[kind], key)) for kind, key in kinds) == {
            ("task", 3): 20,
            ("log", 10): 20,
            ("tasks", 20): 2,
        }
    assert list(redis_server("HGETALL", "streamer:replicas").values()) == ["left"]


# -----------------------------------------------------------------------------
# Broker
# -----------------------------------------------------------------------------


async def new_broker(
    make: Callable[[Settings], streamer.Store] = streamer.MemoryStore, **settings: Any
) -> streamer.Broker:
    """With the claim of its task."""
    chosen = Settings(**settings)
    store = make(chosen)
    await store.create(make_task())
    claim = await claimed(store, "t")
    broker = streamer.Broker(claim.record, store, chosen)
    await broker.hold(claim)
    return broker


async def end_task(broker: streamer.Broker, status: TaskStatus = TaskStatus.FAILED) -> None:
    await broker.publish(task=dataclasses.replace(broker.task, status=status), status=status)


async def collect(subscription: streamer.Subscription) -> list[int]:
    found: list[int] = []
    try:
        async for delivery in subscription:
            found += [event.id for event in delivery.events]
    finally:
        subscription.close()
    return found


@pytest.mark.anyio
@pytest.mark.parametrize("buffer", [1, 3, 256])
async def test_broker_replay_meets_live_without_a_seam(buffer: int) -> None:
    """Clients that come before, amid and after a burst, at any cursor, see each event once, in
    order.
    """
    broker = await new_broker(subscriber_buffer=buffer)
    found: dict[int, list[int]] = {}

    async def client(after: int) -> None:
        found[after] = await collect(broker.subscribe(after))

    async with anyio.create_task_group() as group:
        for batch in range(10):
            group.start_soon(client, batch * 7)
            for number in range(7):
                await broker.publish([make_draft(number)])
            await anyio.lowlevel.checkpoint()
        await end_task(broker)
    assert found == {after: list(range(after + 1, 71)) for after in range(0, 70, 7)}


@pytest.mark.anyio
async def test_broker_feeds_a_slow_client_from_the_log() -> None:
    """A client that does not read costs its buffer, and later gets everything from the log."""
    broker = await new_broker(subscriber_buffer=4)
    slow = broker.subscribe()
    for number in range(1000):
        await broker.publish([make_draft(number)])
    assert slow._receive.statistics().current_buffer_used <= 5
    await end_task(broker)
    assert await collect(slow) == list(range(1, 1001))


class HeldStore(streamer.MemoryStore):
    """Its writes are done, but return when the test lets them."""

    held: anyio.Event | None = None

    async def write(self, *args: Any) -> None:
        await super().write(*args)
        if self.held:
            await self.held.wait()


@pytest.mark.anyio
async def test_broker_hands_over_once_what_the_log_has_already() -> None:
    """What is in the log but not handed over yet waits for that: a client is never ahead, and gets
    it once.
    """
    broker = await new_broker(HeldStore)
    store = broker.store
    assert isinstance(store, HeldStore)
    await broker.publish([make_draft(number) for number in range(10)])
    store.held = anyio.Event()
    found: list[int] = []
    subscription = broker.subscribe(5)

    async def client() -> None:
        found.extend(await collect(subscription))

    async with anyio.create_task_group() as group:
        group.start_soon(broker.publish, [make_draft(10)])
        await anyio.wait_all_tasks_blocked()
        group.start_soon(client)
        await anyio.wait_all_tasks_blocked()
        assert (subscription.cursor, len(await store.read("t", 0, 99))) == (10, 11)
        store.held.set()
        await anyio.wait_all_tasks_blocked()
        store.held = None
        await end_task(broker)
    assert found == [6, 7, 8, 9, 10, 11]


@pytest.mark.anyio
async def test_client_from_another_process_goes_on_where_it_was(tmp_path: Path) -> None:
    """What it has seen was stored by the other, and not yet handed over here: it is caught up with
    first.
    """
    settings = Settings(workspace=tmp_path, test_mode=True)
    store = streamer.MemoryStore(settings)
    supervisor = streamer.Supervisor(settings, store, lambda run: {})
    async with supervisor.open():
        created, _ = await supervisor.submit("p", "t", streamer.parse_options({}, 60))
        claim = await claimed(store, created.id)  # by the other
        for number in range(1, 5):
            async with supervisor.watch(created.id) as stays:
                state = streamer.TaskState(task_id=created.id, last_event_id=number)
                await claim.write(state, numbered(number, 1, created.id))
                async with supervisor.watch(created.id, number) as moved:
                    assert (moved.recovered, moved.cursor) == (True, number)
                assert stays.broker is moved.broker


@pytest.mark.anyio
async def test_broker_tells_a_client_that_retention_overtook_it() -> None:
    """Events dropped before a client read them are not skipped in silence."""
    broker = await new_broker(max_events=10, subscriber_buffer=1)
    slow = broker.subscribe()
    for number in range(100):
        await broker.publish([make_draft(number)])
    with pytest.raises(streamer.SlowClient, match=r"events 2 to 90 were dropped .* after=1"):
        await collect(slow)


@pytest.mark.anyio
async def test_broker_tells_of_a_wait_from_its_first_second_on() -> None:
    """A state that differs in nothing but an agent that has just asked its model is not sent."""
    broker = await new_broker()
    subscription = broker.subscribe()
    waits = []

    async def client() -> None:
        async for delivery in subscription:
            if delivery.state:
                waits.append(json.loads(delivery.state)["data"].get("waiting_on", {}))

    ask = ("Architect", "WriteDesign")
    async with anyio.create_task_group() as group:
        group.start_soon(client)
        for since in (60, None, -60, None, None):
            await anyio.wait_all_tasks_blocked()
            await broker.publish(waiting=since and (*ask, time.time() + since))
        await anyio.wait_all_tasks_blocked()
        await end_task(broker)
    subscription.close()
    assert [wait.get("agent_role") for wait in waits] == [None, "Architect", None, None]


@pytest.mark.anyio
async def test_broker_state_follows_its_events_and_ends_the_stream() -> None:
    """State comes first, after events that changed it, and terminal last."""
    broker = await new_broker()
    subscription = broker.subscribe()
    await broker.publish([make_draft(1, EventType.AGENT_START)], progress=0.5)
    await broker.publish([make_draft(2, EventType.TASK_COMPLETE)], progress=0.2)
    await end_task(broker, TaskStatus.SUCCEEDED)
    seen = []
    async for delivery in subscription:
        seen += [event.type.value for event in delivery.events]
        seen += [json.loads(delivery.state)["data"]["status"]] if delivery.state else []
    subscription.close()
    assert seen == ["SUCCEEDED", "AGENT_START", "TASK_COMPLETE", "SUCCEEDED"]
    assert broker.state.progress == 0.5


def test_run_is_held_back_while_the_loop_is_behind(tmp_path: Path) -> None:
    """A runner faster than the loop waits at `emit`; what waits for the loop stays bounded."""
    run = Run(make_task(), Settings(workspace=tmp_path))
    outbox = run.outbox
    emitted = 0

    def flood() -> None:
        nonlocal emitted
        for _ in range(3 * outbox.MAX_REPORTS):
            run.emit("LOG")
            emitted += 1

    thread = threading.Thread(target=flood)
    thread.start()
    wait_until(lambda: emitted == outbox.MAX_REPORTS)
    thread.join(0.2)
    assert (thread.is_alive(), emitted) == (True, outbox.MAX_REPORTS)
    taken = 0

    def take() -> bool:
        nonlocal taken
        taken += len(outbox.take())
        assert emitted - taken <= outbox.MAX_REPORTS
        return taken == 3 * outbox.MAX_REPORTS

    wait_until(take)
    thread.join(TIMEOUT)
    outbox.finish()
    run.emit("LOG")  # goes nowhere, and does not wait
    assert outbox.take() == []


# -----------------------------------------------------------------------------
# Runners
# -----------------------------------------------------------------------------


def asked(watcher: Watcher, number: int = 1) -> dict[str, Any]:
    """The question that is open, once so many were asked."""
    watcher.wait_for(lambda: len(watcher.of("QUESTION")) >= number)
    return dict(watcher.until(lambda state: opened_after(state, watcher, number))["question"])


def opened_after(state: dict[str, Any], watcher: Watcher, number: int) -> bool:
    question_id = watcher.of("QUESTION")[number - 1]["payload"]["question_id"]
    return bool(state.get("question", {}).get("question_id") == question_id)


def answer(client: Client, task_id: str, question: Mapping[str, Any], text: str) -> httpx2.Response:
    given = {"question_id": question["question_id"], "answer": text}
    return client.http.post(f"/api/tasks/{task_id}/answers", json=given)


def answering(client: Client, task_id: str, *answers: str) -> Watcher:
    """Watches a task to its end, and answers what it asks, one after the other."""
    watcher = client.follow(task_id)
    for number, text in enumerate(answers, start=1):
        response = answer(client, task_id, asked(watcher, number), text)
        assert response.status_code == 202, response.text
    watcher.join()
    return watcher


def two_questions(run: Run) -> dict[str, Any]:
    colour = run.ask("Which colour?", ["red", "blue"], "Painter")
    return {"colour": colour, "why": run.ask("Why?")}


def test_question_is_answered_once_by_whoever_comes(tmp_path: Path, stored: dict[str, Any]) -> None:
    """It is in the state of all clients, takes its choices only, and one answer, over any way."""
    with live(two_questions, tmp_path, max_prompt=100, **stored) as client:
        task_id = client.create()
        first = client.follow(task_id)
        question = asked(first)
        assert question == {
            "message": "Which colour?",
            "event_id": 2,
            "question_id": question["question_id"],
            "choices": ["red", "blue"],
            "free_text": False,
            "agent_role": "Painter",
        }
        assert client.get(f"/api/tasks/{task_id}/state")["question"] == question
        late = client.follow(task_id)
        assert late.states[0]["question"] == question
        wrong = answer(client, task_id, question, "green")
        message = "answer must be one of red, blue, not 'green'"
        assert (wrong.status_code, wrong.json()["error"]["message"]) == (400, message)
        assert answer(client, task_id, question, "x" * 101).status_code == 400
        assert answer(client, task_id, {"question_id": "another"}, "red").status_code == 409
        assert answer(client, "0" * 32, question, "red").status_code == 404
        unknown = {"question_id": question["question_id"], "answer": "red", "by": "me"}
        path = f"/api/tasks/{task_id}/answers"
        assert client.http.post(path, json=unknown).status_code == 400
        with client.socket(task_id) as websocket:
            for text in ("green", " Red "):
                given = {"question_id": question["question_id"], "answer": text}
                websocket.send(json.dumps({"type": "answer", **given}))
            error = receive_until(websocket, lambda message: message["type"] == "error")
            assert error["data"] == {"code": "invalid_request", "message": message}
            receive_until(websocket, is_event("ANSWER"))
        again = answer(client, task_id, question, "blue")
        assert (again.status_code, again.json()["error"]["code"]) == (409, "question_closed")
        question = asked(late, 2)
        assert (question["choices"], question["free_text"]) == (None, True)
        assert answer(client, task_id, question, "because 游戏").status_code == 202
        log = late.join()
        assert first.join() == log
    kinds = ["TASK_START", "QUESTION", "ANSWER", "QUESTION", "ANSWER", "RESULT", "TASK_COMPLETE"]
    assert [event["event_type"] for event in log] == kinds
    assert late.of("ANSWER")[0]["payload"]["message"] == "red"
    assert late.last_state["final_result"] == {"colour": "red", "why": "because 游戏"}
    assert "question" not in late.last_state


NOBODY = "nobody answered within 0.2 s, the setting answer_timeout: 'Which colour?'"


@pytest.mark.parametrize(
    ("end", "seconds", "status", "reason"),
    [
        ("cancel", 9, "CANCELLED", "cancelled by a client"),
        ("delete", 9, "CANCELLED", "cancelled by a client"),
        ("shutdown", 9, "CANCELLED", "cancelled: the server is shutting down"),
        ("time", 0.2, "FAILED", NOBODY),
    ],
)
def test_question_ends_with_its_run(
    tmp_path: Path, end: str, seconds: float, status: str, reason: str
) -> None:
    """A cancel, a delete, a shutdown and the time for an answer end it, and the run with it."""
    with live(two_questions, tmp_path, answer_timeout=seconds * TIMEOUT / 30) as client:
        watcher = client.follow(client.create())
        watcher.wait_for(lambda: watcher.of("QUESTION"))
        path = f"/api/tasks/{watcher.task_id}"
        if end == "cancel":
            assert client.post(f"{path}/cancel").status_code == 202
        elif end == "delete":
            assert client.http.delete(path).status_code == 204
            assert client.http.get(path).status_code == 404
        if end != "shutdown":
            watcher.join()
    watcher.join()
    assert watcher.last_state["status"] == status
    assert watcher.events[-1]["payload"]["message"] == reason
    assert "question" not in watcher.last_state


def test_question_is_cut_and_its_choices_are_not(tmp_path: Path) -> None:
    """A question that is long is cut; choices that would have to be are the runner's error."""

    def runner(run: Run) -> dict[str, Any]:
        with pytest.raises(ValueError, match="choices must have at most 8 characters each, and 32"):
            run.ask("Which?", ["123456789"])
        return {"answer": run.ask("游" * 5000, ["12345678", "continue", "stop"])}

    with live(runner, tmp_path, max_event_bytes=256) as client:
        watcher = client.follow(client.create())
        question = asked(watcher)
        assert question["choices"] == ["12345678", "continue", "stop"]
        assert answer(client, watcher.task_id, question, "continue").status_code == 202
        watcher.join()
    assert watcher.last_state["final_result"] == {"answer": "continue"}


def test_questions_of_several_threads_are_asked_one_after_the_other(tmp_path: Path) -> None:
    """Each thread gets the answer to its own question."""

    def runner(run: Run) -> dict[str, Any]:
        with ThreadPoolExecutor(3) as pool:
            return dict(zip("abc", pool.map(run.ask, "abc"), strict=True))

    with live(runner, tmp_path) as client:
        watcher = client.follow(client.create())
        for number in range(1, 4):
            question = asked(watcher, number)
            response = answer(client, watcher.task_id, question, question["message"] * 2)
            assert response.status_code == 202
        watcher.join()
    assert watcher.last_state["final_result"] == {"a": "aa", "b": "bb", "c": "cc"}
    kinds = [event["event_type"] for event in watcher.of("QUESTION", "ANSWER")]
    assert kinds == ["QUESTION", "ANSWER"] * 3


def test_question_takes_none_of_the_tasks_time(tmp_path: Path) -> None:
    """The clock of the task stands while a person is asked, and goes on after the answer."""

    def runner(run: Run) -> None:
        run.ask("Why?")
        run.wait(TIMEOUT)

    with live(runner, tmp_path, heartbeat=0.05) as client:
        watcher = client.follow(client.create(options={"timeout": 1}))
        question = asked(watcher)
        watcher.wait_for(lambda: len(watcher.states) > 60)  # two seconds and more
        assert answer(client, watcher.task_id, question, "so").status_code == 202
        watcher.join()
    assert watcher.last_state["error_message"] == "timed out after 1 s (options.timeout)"
    began, *_, ended = [datetime.fromisoformat(event["timestamp"]) for event in watcher.events]
    assert (ended - began).total_seconds() > 2


def test_scripted_team_asks_where_it_is_to(tmp_path: Path) -> None:
    """Test mode plays `approve`: a remark is in the next text, stop ends it with the word."""
    with process("-c", QUICK, "--test-mode", "--port", "0", cwd=tmp_path) as server:
        client = server.client
        options = {"approve": ["WritePRD", "WriteDesign"]}
        task_id = client.create(options=options)
        watcher = answering(client, task_id, "use SQLite", "continue")
        assert watcher.last_state["status"] == "SUCCEEDED"
        design = client.http.get(f"/api/tasks/{task_id}/artifacts/docs/system_design.md").text
        assert design.endswith("As a person remarked: use SQLite\n")
        stopped = answering(client, client.create(options=options), "stop: too dear")
    reason = "stopped by a person after WritePRD: stop: too dear"
    assert stopped.events[-1]["payload"]["message"] == reason
    assert [event["event_type"] for event in stopped.of("QUESTION", *TERMINAL)] == [
        "QUESTION",
        "TASK_CANCELLED",
    ]


@pytest.mark.main_path
def test_scripted_team_plays_a_whole_run(scripted: Client) -> None:
    """Test mode: the real team's roles, event types and states, labelled as a test everywhere."""
    task_id = scripted.create("Build a <b>todo</b> app", options={"run_tests": True})
    record = scripted.watch(task_id)
    assert record.close_code == 1000
    assert [message["type"] for message in record.messages[:2]] == ["connected", "state"]
    assert record.ids == list(range(1, len(record.ids) + 1))
    roles = ["ProductManager", "Architect", "ProjectManager", "Engineer", "QaEngineer"]
    assert [event["agent_role"] for event in record.of("AGENT_START")] == roles
    assert {event["event_type"] for event in record.events} == WHOLE_RUN | {"REASONING"}
    assert record.events[-1]["event_type"] == "TASK_COMPLETE"
    assert record.messages[-1]["type"] == "state"
    progress = [state["progress"] for state in record.data("state")]
    assert progress == sorted(progress)
    assert (progress[0], progress[-1]) == (0.0, 1.0)
    assert record.last_state["status"] == "SUCCEEDED"
    assert record.last_state["final_result"]["mode"] == "test"
    assert (
        record.data("connected")[0]["mode"]
        == scripted.get(f"/api/tasks/{task_id}")["mode"]
        == "test"
    )
    files = scripted.get(f"/api/tasks/{task_id}/artifacts")
    assert [file["path"] for file in files] == record.last_state["final_result"]["files"]
    prd = scripted.http.get(f"/api/tasks/{task_id}/artifacts/docs/prd.md")
    assert "\n> Build a <b>todo</b> app\n" in prd.text
    assert prd.headers["content-type"] == "text/plain; charset=utf-8"


def test_scripted_team_is_watched_in_few_messages_while_three_are_at_work(
    scripted: Client,
) -> None:
    """A client that stops after 80 messages has seen it all; the texts are whole."""
    record = scripted.watch(scripted.create("Build\na todo app"))
    assert len(record.messages) < 80
    at_work: set[str] = set()
    most = 0
    for event in record.events:
        if event["event_type"] == "AGENT_START":
            at_work.add(event["agent_role"])
        elif event["event_type"] == "AGENT_COMPLETE":
            at_work.remove(event["agent_role"])
        most = max(most, len(at_work))
    assert most == 3
    said: dict[str, str] = {}
    for event in record.of("TOKEN"):
        role = event["agent_role"]
        said[role] = said.get(role, "") + event["payload"]["message"]
    *documents, code, test = record.of("MESSAGE")
    assert said.pop("Engineer") == "".join(
        f"```python\n{text}```\n" for text in (streamer.CODE, streamer.TEST)
    )
    assert (code["payload"]["content"], test["payload"]["content"]) == (
        streamer.CODE,
        streamer.TEST,
    )
    assert said == {each["agent_role"]: each["payload"]["content"] for each in documents}
    assert said["ProductManager"].startswith("# Requirements\n\n> Build\n> a todo app\n")


def test_scripted_team_writes_code_that_runs(tmp_path: Path) -> None:
    """The app does what its document says, and its test passes."""
    for *_, path, text in streamer.SCRIPT:
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(text)

    def python(*arguments: str) -> str:
        return subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout

    python("src/app.py", "add", "read the PRD")
    python("src/app.py", "add", "write code")
    assert python("src/app.py", "done", "2") == "1 [ ] read the PRD\n2 [x] write code\n"
    assert "1 passed" in python("-m", "pytest", "-p", "no:cacheprovider", "tests")


def test_scripted_team_adds_to_the_cost_of_earlier_runs(scripted: Client) -> None:
    """A restarted task goes on from what it had cost; /metrics counts each token once."""
    task_id = scripted.create(options={"implement": False, "investment": 2})
    with scripted.socket(task_id) as websocket:
        receive_until(
            websocket,
            lambda message: message["data"].get("cost", {}).get("completion_tokens", 0) > 0,
        )
        scripted.post(f"/api/tasks/{task_id}/cancel")
        before = watched(websocket).last_state["cost"]
    assert scripted.post(f"/api/tasks/{task_id}/run?restart=true").status_code == 202
    record = scripted.watch(task_id)
    team = [part[5].replace("{prompt}", "Build a todo app") for part in streamer.SCRIPT[:3]]
    tokens = before["completion_tokens"] + sum(len(text.split()) for text in team)
    cost = {"prompt_tokens": 0, "completion_tokens": tokens, "total_cost": 0.0}
    cost["max_budget"] = 2
    found = record.last_state["cost"]
    assert found == record.last_state["final_result"]["cost"]
    by_role = found.pop("by_role")
    assert (found, list(by_role)) == (cost, [part[0] for part in streamer.SCRIPT[:3]])
    assert sum(own["completion_tokens"] for own in by_role.values()) == tokens
    assert (
        f"\nstreamer_model_completion_tokens_total {tokens}" in scripted.http.get("/metrics").text
    )


def test_scripted_team_does_not_import_metagpt(tmp_path: Path) -> None:
    """Test mode needs neither MetaGPT nor what it brings, and importing streamer starts nothing."""
    code = """
import functools, sys, threading, anyio, streamer
settings = streamer.Settings(test_mode=True)
streamer.run_scripted = functools.partial(streamer.run_scripted, seconds=0.2)
app = streamer.create_app(settings)
async def one():
    async with app.state.supervisor.open():
        options = streamer.parse_options({"implement": False}, 60)
        task, _ = await app.state.supervisor.submit("p", "t", options)
        async with app.state.supervisor.watch(task.id) as subscription:
            await app.state.supervisor.start(task.id)
            return [event.type async for delivery in subscription for event in delivery.events]
assert anyio.run(one)[-1] == "TASK_COMPLETE"
heavy = {"metagpt", "openai", "loguru", "pydantic", "yaml", "numpy"}
assert not heavy & set(sys.modules), "imported"
"""
    with process("-c", code, cwd=tmp_path) as script:
        assert script.wait() == 0, "".join(script.errors)


MODEL = {"api_key": "sk-abcdefgh", "model": "some-model"}
AZURE = {**MODEL, "api_type": "azure", "base_url": "https://some.openai.azure.com"}
# the environment, what config2.yaml holds as `llm` (None: there is no such file); the complaint
WRONG_MODELS: list[tuple[dict[str, str], Any, str]] = [
    (
        {"OPENAI_API_KEY": "sk\n"},
        None,
        "OPENAI_API_KEY holds a line break, which no key has: copy it again",
    ),
    ({"OPENAI_API_KEY": "“sk”"}, None, "OPENAI_API_KEY holds '“', which no key has: copy it again"),
    (
        {"OPENAI_API_KEY": "s k"},
        None,
        "OPENAI_API_KEY holds a blank, which no key has: copy it again",
    ),
    (
        {"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": "localhost:1234/v1"},
        None,
        "OPENAI_BASE_URL must have the form https://api.openai.com/v1, not 'localhost:1234/v1'",
    ),
    (
        {"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": "http://h/v1/chat/completions"},
        None,
        "OPENAI_BASE_URL must end before /chat/completions, which is added to it",
    ),
    (
        {"OPENAI_API_KEY": KEY, "OPENAI_MODEL": " "},
        None,
        "OPENAI_MODEL must be the name of a model of openai",
    ),
    (
        {"ANTHROPIC_API_KEY": KEY},
        None,
        "ANTHROPIC_MODEL is missing: the name of a model of anthropic",
    ),
    ({}, {}, "llm.model is missing: the name of a model of openai"),
    ({}, {"model": "some-model"}, "llm.api_key is missing"),
    ({}, {**MODEL, "api_key": 12345678}, "llm.api_key must be text, in quotes"),
    (
        {},
        {**MODEL, "base_url": "http://a b/v1"},
        "llm.base_url must have the form https://api.openai.com/v1, not 'http://a b/v1'",
    ),
    (
        {},
        {**MODEL, "base_url": 7},
        "llm.base_url must have the form https://api.openai.com/v1, not 7",
    ),
    (
        {},
        {**MODEL, "api_type": "ollama"},
        "llm.base_url is missing, for example http://127.0.0.1:11434/api",
    ),
    (
        {},
        {**MODEL, "api_type": "azure"},
        "llm.base_url is missing, for example https://<resource>.openai.azure.com",
    ),
    ({}, AZURE, "llm.api_version is missing, for example 2024-10-21"),
    ({}, {**MODEL, "max_token": "much"}, "llm.max_token must be a number, not 'much'"),
    (
        {},
        {**MODEL, "proxy": "host:3128"},
        "llm.proxy must have the form http://host:8080 or socks5://host:1080",
    ),
    (
        {"ALL_PROXY": "ftp://host:1080"},
        MODEL,
        "ALL_PROXY must have the form http://host:8080 or socks5://host:1080",
    ),
]


@pytest.fixture
def configure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """MetaGPT's configuration from an environment and a config2.yaml; no path in complaints."""
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / ".metagpt" / "config2.yaml"
    path.parent.mkdir()

    def load(environ: Mapping[str, str], text: str | None) -> dict[str, Any]:
        if text is not None:
            path.write_text(text, encoding="utf-8")
        try:
            return streamer.model_config({"METAGPT_PROJECT_ROOT": str(tmp_path), **environ})
        except streamer.SettingsError as error:
            raise streamer.SettingsError(str(error).replace(f" in {path}", "")) from error

    return load


@pytest.mark.parametrize(("environ", "llm", "complaint"), WRONG_MODELS)
def test_model_config_names_the_setting_that_cannot_work(
    configure: Callable[..., dict[str, Any]], environ: dict[str, str], llm: Any, complaint: str
) -> None:
    """What would fail at the first request is said at the start, by the name it was given under."""
    text = None if llm is None else yaml.safe_dump({"llm": llm})
    with pytest.raises(streamer.SettingsError) as caught:
        configure(environ, text)
    assert str(caught.value) == complaint


def test_model_config_lists_the_known_api_types(configure: Callable[..., dict[str, Any]]) -> None:
    """An api_type that MetaGPT does not have is told the ones it has."""
    with pytest.raises(streamer.SettingsError) as caught:
        configure({}, yaml.safe_dump({"llm": {**MODEL, "api_type": "gpt"}}))
    assert re.match(
        "llm.api_type must be one of openai, anthropic, .*, not 'gpt'$", str(caught.value)
    )


@pytest.mark.parametrize(
    ("environ", "llm", "expected"),
    [
        (
            {"OPENAI_API_KEY": KEY},
            None,
            {
                "api_type": "openai",
                "api_key": KEY,
                "model": "gpt-4o",
                "base_url": "https://api.openai.com/v1",
            },
        ),
        (
            {"ANTHROPIC_API_KEY": KEY, "ANTHROPIC_MODEL": "some-model"},
            None,
            {
                "api_type": "anthropic",
                "api_key": KEY,
                "model": "some-model",
                "base_url": "https://api.anthropic.com",
            },
        ),
        (  # what MetaGPT wrote as an example counts as nothing
            {"OPENAI_API_KEY": KEY, "OPENAI_MODEL": "some-model", "OPENAI_BASE_URL": "http://h/v1"},
            {"api_key": "YOUR_API_KEY"},
            {
                "api_type": "openai",
                "api_key": KEY,
                "model": "some-model",
                "base_url": "http://h/v1",
            },
        ),
        (  # the file wins, with its vendor's own server
            {"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": "http://h/v1"},
            {**MODEL, "api_type": "claude"},
            {**MODEL, "api_type": "claude", "base_url": "https://api.anthropic.com"},
        ),
        (  # a server of one's own needs no key
            {"HTTPS_PROXY": "host:3128"},
            {"model": "some-model", "base_url": "http://h/v1", "api_key": ""},
            {"model": "some-model", "base_url": "http://h/v1"},
        ),
    ],
)
def test_model_config_is_complete(
    configure: Callable[..., dict[str, Any]],
    environ: dict[str, str],
    llm: Any,
    expected: dict[str, Any],
) -> None:
    """A key and a model are enough, and the server is the one of their vendor."""
    text = None if llm is None else yaml.safe_dump({"llm": llm})
    assert configure(environ, text)["llm"] == expected


def test_model_config_does_not_quote_a_line_that_may_hold_a_key(
    configure: Callable[..., dict[str, Any]],
) -> None:
    """A file that is no YAML is told by its line's number."""
    with pytest.raises(streamer.SettingsError) as caught:
        configure({}, f"llm:\n  api_key: '{KEY}\n")
    assert str(caught.value).endswith("cannot be read: line 3: found unexpected end of stream")


def test_configuration_that_metagpt_refuses_is_told_by_its_field() -> None:
    """pydantic's page about a configuration becomes a line with the field's name."""
    pydantic: Any = importlib.import_module("pydantic")
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        pydantic.TypeAdapter(dict[str, dict[str, bool]]).validate_python(
            {"llm": {"stream": "perhaps"}}
        )
    reason = "llm.stream in config2.yaml is not what MetaGPT takes: Input should be a valid boolean"
    assert streamer.refused_field(caught.value).startswith(reason)


def sdk_error(vendor: str, response: httpx2.Response) -> Exception:
    """What the vendor's own client raises for an answer."""
    sdk: Any = importlib.import_module("anthropic" if vendor == "anthropic" else "openai")
    options: dict[str, Any] = {
        "api_key": KEY,
        "max_retries": 0,
        "base_url": "http://models.test/v1",
    }
    request: dict[str, Any] = {"model": "some-model", "max_tokens": 1}
    request["messages"] = [{"id": "m", "role": "user", "content": "hello"}]
    transport = httpx2.MockTransport(lambda _: response)
    with httpx2.Client(transport=transport) as http:
        if vendor == "anthropic":
            ask = sdk.Anthropic(http_client=http, **options).messages.create
        else:
            ask = sdk.OpenAI(http_client=http, **options).chat.completions.create
        with pytest.raises(sdk.APIError) as caught:
            ask(**request)
    error: Exception = caught.value
    return error


def model_settings(
    vendor: str = "openai", base_url: str = "http://models.test/v1"
) -> types.SimpleNamespace:
    """A model's configuration, as far as `model_fault` reads it."""
    return types.SimpleNamespace(
        api_type=vendor, base_url=base_url, model="some-model", max_token=4096, proxy=None
    )


API = "the model API at http://models.test/v1"
LIMIT = {"error": {"message": "slow down", "code": "rate_limit_exceeded"}}
RETRY_INFO = {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "3.5s"}
QUOTA = {"error": {"code": 429, "message": "over the current quota", "details": [RETRY_INFO]}}
RAW = {"error": {"message": "Provider returned error", "metadata": {"raw": "busy upstream"}}}
OVERLOADED = {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}
GATEWAY = "<html><head><title>502 Bad Gateway</title></head></html>"
PAST = "Sun, 06 Nov 1994 08:49:37 GMT"
# vendor, status, headers, body; the seconds to wait, the reason
TRIED_AGAIN: list[tuple[str, int, dict[str, str], Any, float | None, str]] = [
    ("openai", 429, {}, LIMIT, None, "answered 429: slow down"),
    ("openai", 429, {"retry-after": "2"}, LIMIT, 2.0, "answered 429: slow down"),
    (
        "openai",
        429,
        {"retry-after": "1", "retry-after-ms": "300"},
        LIMIT,
        0.3,
        "answered 429: slow down",
    ),
    ("openai", 429, {"retry-after": PAST}, LIMIT, 0.0, "answered 429: slow down"),
    ("openai", 429, {"retry-after": "soon"}, LIMIT, None, "answered 429: slow down"),
    ("openai", 429, {}, [QUOTA], 3.5, "answered 429: over the current quota"),
    ("openai", 429, {}, RAW, None, "answered 429: Provider returned error: busy upstream"),
    ("openai", 502, {}, GATEWAY, None, "answered 502: 502 Bad Gateway"),
    ("openai", 503, {}, "", None, "answered 503: without a word"),
    ("anthropic", 529, {}, OVERLOADED, None, "answered 529: Overloaded"),
]


@pytest.mark.parametrize(("vendor", "status", "headers", "body", "wait", "reason"), TRIED_AGAIN)
def test_model_fault_that_may_pass_is_tried_again(
    vendor: str, status: int, headers: dict[str, str], body: Any, wait: float | None, reason: str
) -> None:
    """A server that is busy says so in its own words, and for how long."""
    text = body if isinstance(body, str) else json.dumps(body)
    error = sdk_error(vendor, httpx2.Response(status, headers=headers, content=text))
    assert streamer.model_fault(error, model_settings(vendor), []) == (
        f"{API} {reason}",
        True,
        wait,
    )


TOO_LONG = "maximum context length is 4096 tokens (904 in the messages, 4096 in the completion)"
# vendor, status, body; the reason
FINAL: list[tuple[str, int, Any, str]] = [
    (
        "openai",
        429,
        {"error": {"message": "no more", "code": "insufficient_quota"}},
        "says that no credit is left (429): add some, or change OPENAI_API_KEY or llm.api_key. "
        "no more",
    ),
    (
        "openai",
        402,
        {"error": {"message": "Insufficient Balance", "code": 402}},
        "says that no credit is left (402): add some, or change OPENAI_API_KEY or llm.api_key. "
        "Insufficient Balance",
    ),
    (
        "anthropic",
        400,
        {"error": {"type": "invalid_request_error", "message": "Your credit balance is too low"}},
        "says that no credit is left (400): add some, or change ANTHROPIC_API_KEY or llm.api_key. "
        "Your credit balance is too low",
    ),
    (
        "openai",
        401,
        {"error": {"message": f"not {KEY}"}},
        "rejected the key (401): check OPENAI_API_KEY or llm.api_key. not ***",
    ),
    (
        "anthropic",
        401,
        {"error": {"message": "invalid x-api-key"}},
        "rejected the key (401): check ANTHROPIC_API_KEY or llm.api_key. invalid x-api-key",
    ),
    (
        "openai",
        400,
        [{"error": {"message": "API key not valid. Please pass one"}}],
        "rejected the key (400): check OPENAI_API_KEY or llm.api_key. "
        "API key not valid. Please pass one",
    ),
    (
        "openai",
        403,
        {"error": {"message": "not in your country"}},
        "refused access (403): check that OPENAI_API_KEY or llm.api_key may use 'some-model' "
        "(OPENAI_MODEL or llm.model). not in your country",
    ),
    (
        "openai",
        404,
        {"error": {"message": "it does not exist", "code": "model_not_found"}},
        "has no model 'some-model' (404): check OPENAI_MODEL or llm.model. it does not exist",
    ),
    (
        "azure",
        404,
        {"error": {"code": "DeploymentNotFound", "message": "no such resource"}},
        "has no model 'some-model' (404): check llm.model. no such resource",
    ),
    (
        "openai",
        404,
        {"detail": "Not Found"},
        "has nothing at this address (404): check OPENAI_BASE_URL or llm.base_url. Not Found",
    ),
    (
        "openai",
        422,
        {"detail": [{"loc": ["body", "n"], "msg": "Field required"}, {"msg": "and more"}]},
        "answered 422: body.n: Field required; and more",
    ),
    (
        "openai",
        400,
        {"object": "error", "message": TOO_LONG},
        "finds the prompt too long (400): take a model with a larger context "
        f"(OPENAI_MODEL or llm.model), or a smaller llm.max_token (now 4096). {TOO_LONG}",
    ),
    ("openai", 400, {"error": {"message": "w" * 5000}}, f"answered 400: {'w' * 299}…"),
]


@pytest.mark.parametrize(("vendor", "status", "body", "reason"), FINAL)
def test_model_fault_that_cannot_pass_names_the_setting(
    vendor: str, status: int, body: Any, reason: str
) -> None:
    """What stays as it is until a person changes something says what that is."""
    error = sdk_error(vendor, httpx2.Response(status, json=body))
    assert streamer.model_fault(error, model_settings(vendor), [KEY]) == (
        f"{API} {reason}",
        False,
        None,
    )


def test_model_fault_with_a_wait_of_an_hour_is_final() -> None:
    """Nobody is held for an hour by a server's rate limit."""
    error = sdk_error("openai", httpx2.Response(429, headers={"retry-after": "3600"}, json=LIMIT))
    reason = f"{API} wants no request for 3600 s (429): a run waits 120 s at most. slow down"
    assert streamer.model_fault(error, model_settings(), []) == (reason, False, None)


@pytest.mark.parametrize(
    ("body", "reason", "retry"),
    [
        ({"error": {"message": "no GPU", "type": "server_error"}}, "answered 500: no GPU", True),
        ({"object": "error", "message": "no GPU", "code": 503}, "answered 503: no GPU", True),
        (LIMIT, "answered 429: slow down", True),
        (OVERLOADED, "answered 529: Overloaded", True),
        ({"error": "no GPU"}, "answered 500: no GPU", True),
        (
            {"error": "Unexpected endpoint or method. (POST /chat)"},
            "has nothing at this address: check OPENAI_BASE_URL or llm.base_url. "
            "Unexpected endpoint or method. (POST /chat)",
            False,
        ),
    ],
)
def test_model_fault_takes_the_status_from_an_error_object(
    body: Any, reason: str, retry: bool
) -> None:
    """An error that came inside a stream means what the same error means as a status."""
    error = streamer.ServerError(body, 200)
    assert streamer.model_fault(error, model_settings(), []) == (f"{API} {reason}", retry, None)


@pytest.mark.parametrize(
    ("vendor", "base_url", "advice"),
    [
        (
            "openai",
            "http://u:pass@models.test",
            "OPENAI_BASE_URL or llm.base_url (does it end in /v1?)",
        ),
        ("ollama", "http://models.test", "llm.base_url (as http://127.0.0.1:11434/api)"),
        ("azure", "http://models.test", "llm.base_url (as https://<resource>.openai.azure.com)"),
    ],
)
def test_model_fault_names_the_base_url_where_a_page_came(
    vendor: str, base_url: str, advice: str
) -> None:
    """A 200 that is no completion comes from another program: the address is what to change."""
    error = streamer.NotACompletion("<!doctype html><title>Open WebUI</title>")
    reason = f"the model API at http://models.test sent no completion: check {advice}. Open WebUI"
    assert streamer.model_fault(error, model_settings(vendor, base_url), []) == (
        reason,
        False,
        None,
    )


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            ConnectionRefusedError(errno.ECONNREFUSED, "Connect call failed ('127.0.0.1', 9)"),
            "cannot be reached: Connection refused. Check OPENAI_BASE_URL or llm.base_url",
        ),
        (
            httpx2.ConnectError("[Errno -2] Name or service not known"),
            "cannot be reached: Name or service not known. Check OPENAI_BASE_URL or llm.base_url",
        ),
        (httpx2.ReadTimeout(""), "did not answer in time"),
        (TimeoutError("silent for 300 s"), "did not answer in time: silent for 300 s"),
        (httpx2.RemoteProtocolError("peer closed"), "broke off the connection: peer closed"),
        (
            json.JSONDecodeError("Expecting value", "{", 1),
            "sent what is no valid answer: Expecting value: line 1 column 2 (char 1)",
        ),
    ],
)
def test_model_fault_says_how_a_connection_ended(error: Exception, reason: str) -> None:
    """The first cause is told, without the names of Python's classes, and it is tried again."""
    assert streamer.model_fault(error, model_settings(), []) == (f"{API} {reason}", True, None)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (streamer.RunFailed("a reason"), "a reason"),
        (OSError(errno.EIO, "Broken", "/some/a.py"), "the file a.py cannot be used: Broken"),
        (
            json.JSONDecodeError("Expecting value", "{", 1),
            "the model's answer has not the form asked; a stronger model (llm.model) may keep "
            "to the form asked. It begins 'Sure! Here it is'. "
            "Expecting value: line 1 column 2 (char 1)",
        ),
        (
            KeyError("Task list"),
            "MetaGPT could not go on, perhaps for the model's answer, which begins "
            "'Sure! Here it is': KeyError: 'Task list'",
        ),
        (
            Exception("Traceback (most recent call last):\n  File …\nKeyError: 'a'\n"),
            "MetaGPT could not go on, perhaps for the model's answer, which begins "
            "'Sure! Here it is': Exception: KeyError: 'a'",
        ),
    ],
)
def test_failure_reason_is_a_line_for_a_person(error: Exception, reason: str) -> None:
    """What stopped MetaGPT is told without a page of Python, with the beginning of what came."""
    assert streamer.failure_reason(error, "Sure!\nHere it is") == reason


def test_model_fault_is_none_for_other_errors() -> None:
    """An error of MetaGPT's own code is not the model's."""
    assert streamer.model_fault(KeyError("text"), model_settings(), []) is None


VENDOR_SCRIPT = """
import asyncio, json, pathlib, sys, streamer
engine = streamer.load_metagpt(pathlib.Path("workspace"))
from metagpt.configs.llm_config import LLMConfig
from metagpt.provider.llm_provider_registry import create_llm_instance

async def ask(settings):
    model = create_llm_instance(LLMConfig(**settings))
    model.aclient.max_retries = 0
    try:
        await model._achat_completion([{"id": "m", "role": "user", "content": "hello"}])
    except Exception as error:
        assert streamer.model_fault(error, model.config, []).reason
    await model.aclient.close()

for settings in json.loads(sys.argv[1]):
    asyncio.run(ask(settings))
"""


@contextlib.contextmanager
def refusing_proxy() -> Iterator[tuple[str, list[str]]]:
    """The address of a proxy that lets nothing through, and the heads of what it was asked."""
    heads: list[str] = []
    refusal = b"HTTP/1.1 403 Forbidden\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"

    def serve() -> None:
        with contextlib.suppress(OSError):  # closed at the end
            while True:
                with listener.accept()[0] as client:
                    heads.append(client.recv(65536).partition(b"\r\n\r\n")[0].decode())
                    client.sendall(refusal)

    with loopback() as listener:
        listener.listen()
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}", heads
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(TIMEOUT)


def test_model_requests_go_to_their_own_vendor_through_llm_proxy(tmp_path: Path) -> None:
    """A vendor's default server, its key and nobody else's, and the proxy the settings name."""
    plain = {"model": "m", "api_version": "1"}
    vendors = ["openai", "mistral", "openrouter", "fireworks", "anthropic", "claude"]
    models = [{**plain, "api_type": vendor, "api_key": f"key-of-{vendor}"} for vendor in vendors]
    models += [
        {
            **plain,
            "api_type": vendor,
            "api_key": f"key-of-{vendor}",
            "base_url": "http://models.test",
        }
        for vendor in ("openai", "moonshot", "anthropic", "azure")
    ]
    environ = {"OPENAI_API_KEY": KEY, "OPENAI_ORG_ID": "org-of-openai", "ANTHROPIC_API_KEY": KEY}
    environ |= {"ANTHROPIC_AUTH_TOKEN": KEY, "ANTHROPIC_BASE_URL": "http://other.test"}
    with refusing_proxy() as (proxy, heads):
        asked = json.dumps([{**model, "proxy": proxy} for model in models])
        with process("-c", VENDOR_SCRIPT, asked, cwd=tmp_path, environ=environ) as script:
            assert script.popen.wait(4 * TIMEOUT) == 0, "".join(script.errors)
    assert [head.split()[1] for head in heads] == [
        "api.openai.com:443",
        "api.mistral.ai:443",
        "openrouter.ai:443",
        "api.fireworks.ai:443",
        "api.anthropic.com:443",
        "api.anthropic.com:443",
        "http://models.test/chat/completions",
        "http://models.test/chat/completions",
        "http://models.test/v1/messages",
        "http://models.test/openai/deployments/m/chat/completions?api-version=1",
    ]
    assert [re.findall("(?i)(?:key|org)-of-\\w+", head) for head in heads[6:]] == [
        ["key-of-openai", "org-of-openai"],
        ["key-of-moonshot"],
        ["key-of-anthropic"],
        ["key-of-azure"],
    ]
    assert KEY not in "".join(heads)


@contextlib.contextmanager
def socks_proxy(url: str) -> Iterator[tuple[str, list[str]]]:
    """A SOCKS5 proxy (RFC 1928) that leads to `url` alone, and the hosts it was asked for."""
    target = urlsplit(url)
    hosts: list[str] = []

    def copy(source: socket.socket, sink: socket.socket) -> None:
        while data := source.recv(65536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(512)
            self.request.sendall(b"\x05\x00")  # no authentication
            asked = self.request.recv(512)
            hosts.append(asked[5 : 5 + asked[4]].decode())
            self.request.sendall(b"\x05\x00\x00\x01" + bytes(6))
            with socket.create_connection((target.hostname, target.port)) as server:
                back = threading.Thread(target=copy, args=(server, self.request))
                back.start()
                copy(self.request, server)
                back.join()

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as proxy:
        loop = threading.Thread(target=proxy.serve_forever)
        loop.start()
        yield f"socks5://127.0.0.1:{proxy.server_address[1]}", hosts
        proxy.shutdown()
        loop.join()


def test_model_is_reached_through_a_socks_proxy(tmp_path: Path) -> None:
    """ALL_PROXY=socks5://… leads to a server whose name only the proxy knows."""
    with model_server() as (model, url), socks_proxy(url) as (proxy, hosts):
        environ = {"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": "http://models.test/v1"}
        environ["ALL_PROXY"] = proxy
        command = (SERVER, "run", "[mark=socks]", "--no-implement", "--n-round", "1", "--json")
        with process(*command, cwd=tmp_path, environ=environ) as ended:
            assert ended.popen.wait(4 * TIMEOUT) == 0, "".join(ended.errors)
    assert len(model.requests["socks"]) == 1
    assert set(hosts) == {"models.test"}


BODIES: list[tuple[bytes, list[Any]]] = [
    (sse({"a": 1}, {"b": "é"}) + DONE, [{"a": 1}, {"b": "é"}, None]),
    (b'\xef\xbb\xbfdata: {"a": 1}\r\n\r\ndata:{"b": 2}\r\n\r\n', [{"a": 1}, {"b": 2}]),
    (b': alive\n\nevent: x\nid: 7\nretry: 9\ndata: {"a":\ndata: 1}\n\n', [{"a": 1}]),
    (b'data: {"a": 1}', [{"a": 1}]),  # the body ends with it
    (b'event: ping\ndata: {"type": "ping"}\n\n', []),  # its server lives, its model is silent
    (DONE + sse({"a": 1}), [None]),
    (b'{"a": 1}\n{"b": 2}\n', [{"a": 1}, {"b": 2}]),
    (b'{\n  "a": {\n    "b": 1\n  }\n}', [{"a": {"b": 1}}]),
    (sse({"a": "x" * 100_000, "error": None}), [{"a": "x" * 100_000, "error": None}]),
    (b"", []),
]


@pytest.mark.parametrize(("body", "documents"), BODIES)
@pytest.mark.parametrize("size", [1, 7, 1 << 20])
def test_body_reader_takes_documents_apart(body: bytes, documents: list[Any], size: int) -> None:
    """Server-sent events, lines and whole documents, in whatever pieces they come."""
    reader = streamer._BodyReader()
    pieces = [body[start : start + size] for start in range(0, len(body), size)]
    found = [document for piece in pieces for document in reader.feed(piece)]
    assert [*found, *reader.end()] == documents


ERRORS_IN_BODIES: list[tuple[bytes, type[Exception], str]] = [
    (sse({"error": {"message": "overloaded"}}), streamer.ServerError, "overloaded"),
    (sse({"error": "out of memory"}), streamer.ServerError, "out of memory"),
    (sse({"object": "error", "message": "CUDA"}), streamer.ServerError, "CUDA"),
    (b'event: error\ndata: {"message": "died"}\n\n', streamer.ServerError, "died"),
    (b'error: {"message": "context shift"}\n\n', streamer.ServerError, "context shift"),
    (b'{"error": "CUDA error"}\n', streamer.ServerError, "CUDA error"),
    (b'data: {"choices": [{"del', streamer.PartialAnswer, "the model's answer broke off, in '{"),
    (b"data: {not json}\n\n", streamer.PartialAnswer, "the model's answer broke off, in '{not"),
    (b'{"choices": [', streamer.PartialAnswer, "the model's answer broke off, in '{"),
    (b"<!doctype html>\n<title>login</title>\n", streamer.NotACompletion, "<!doctype html>"),
    (sse([1, 2]), streamer.NotACompletion, "[1,2]"),
]


@pytest.mark.parametrize(("body", "kind", "text"), ERRORS_IN_BODIES)
def test_body_reader_raises_what_is_no_answer(
    body: bytes, kind: type[Exception], text: str
) -> None:
    """Errors inside a stream, of every vendor's form, halves of a document, and web pages."""
    reader = streamer._BodyReader()
    with pytest.raises(kind) as caught:
        list(itertools.chain(reader.feed(body), reader.end()))
    assert str(caught.value).startswith(text)


COUNTS = {"prompt_tokens": 7, "completion_tokens": 5}
THINKING_BLOCKS = [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}]
ANSWER_BLOCKS = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "x"}]
CHUNKS: list[tuple[str, dict[str, Any], tuple[Any, ...]]] = [
    ("OpenAILLM", choice({"content": "x"}), ("x", "", "", {})),
    ("OpenAILLM", choice(None, "length"), ("", "", "length", {})),
    ("OpenAILLM", {"choices": None}, ("", "", "", {})),
    ("OpenAILLM", {"choices": [], "usage": COUNTS}, ("", "", "", COUNTS)),
    ("OpenAILLM", {"choices": [], "x_groq": {"usage": COUNTS}}, ("", "", "", COUNTS)),
    *(
        ("OpenAILLM", {"choices": [], "usage": usage}, ("", "", "", {}))
        for usage in ("7", [7], {"prompt_tokens": -7}, {"prompt_tokens": 10**30})
    ),
    (
        "OpenAILLM",
        {"usage": {"prompt_tokens": math.nan, "completion_tokens": "5"}},
        ("", "", "", {}),
    ),
    ("OpenAILLM", choice({"content": None, "reasoning_content": "hm"}), ("", "hm", "", {})),
    ("OpenAILLM", choice({"reasoning": "hm", "reasoning_content": "hm"}), ("", "hm", "", {})),
    ("OpenAILLM", choice({"content": THINKING_BLOCKS}), ("", "hm", "", {})),
    ("OpenAILLM", choice({"refusal": "I cannot"}, "stop"), ("I cannot", "", "refusal", {})),
    ("OpenAILLM", {"choices": [{"index": 1, "delta": {"content": "other"}}]}, ("", "", "", {})),
    ("OpenAILLM", {"choices": [{"message": {"content": "x"}}]}, ("x", "", "stop", {})),
    ("AnthropicLLM", {"delta": {"type": "text_delta", "text": "x"}}, ("x", "", "", {})),
    ("AnthropicLLM", {"delta": {"type": "thinking_delta", "thinking": "hm"}}, ("", "hm", "", {})),
    (
        "AnthropicLLM",
        {"delta": {"stop_reason": "max_tokens"}, "usage": {"output_tokens": 5}},
        ("", "", "max_tokens", {"completion_tokens": 5}),
    ),
    (
        "AnthropicLLM",
        {"content": ANSWER_BLOCKS, "stop_reason": "end_turn"},
        ("x", "hm", "end_turn", {}),
    ),
    ("OllamaLLM", {"message": {"content": "x", "thinking": "hm"}}, ("x", "hm", "", {})),
    ("OllamaLLM", {"response": "x", "done": True}, ("x", "", "stop", {})),
    (
        "OllamaLLM",
        {"message": {}, "done": True, "done_reason": "length", "prompt_eval_count": 7},
        ("", "", "length", {"prompt_tokens": 7}),
    ),
]


@pytest.mark.parametrize(("vendor", "document", "chunk"), CHUNKS)
def test_chunk_is_the_same_of_every_vendor(
    vendor: str, document: dict[str, Any], chunk: tuple[Any, ...]
) -> None:
    """Text, thinking, finish reason and tokens, whatever the vendor calls them."""
    assert streamer.MODEL_APIS[vendor].chunk(document) == chunk


class Refusal(Exception):
    """An SDK's error, as far as a request reads it."""

    status_code = 400

    def __init__(self, text: str, param: str | None) -> None:
        super().__init__(text)
        self.param = param


def request_form(**configured: Any) -> Any:
    config = types.SimpleNamespace(max_token=4096, base_url=f"http://{os.urandom(8).hex()}.test")
    vars(config).update(configured, model_fields_set=set(configured))
    return streamer._RequestForm(types.SimpleNamespace(config=config, model="some-model"))


ASKS = {"model": "m", "max_tokens": 4096, "temperature": 0.0, "stream_options": {}}
RENAMED = {"model": "m", "max_completion_tokens": 32768, "temperature": 0.0, "stream_options": {}}
# What the server says, the error's param; the arguments that are sent then.
REFUSALS: list[tuple[str, str | None, dict[str, Any]]] = [
    (USE_OTHER, "max_tokens", RENAMED),
    (USE_OTHER, None, RENAMED),
    ("only the default (1) is supported", "temperature", {**ASKS, "temperature": ...}),
    ("unknown field stream_options", None, {**ASKS, "stream_options": ...}),
    ("bad option", "stream_options.include_usage", {**ASKS, "stream_options": ...}),
]


@pytest.mark.parametrize(("text", "param", "arguments"), REFUSALS)
def test_request_form_learns_from_refusals(
    text: str, param: str | None, arguments: dict[str, Any]
) -> None:
    """What a refusal names is renamed or left out, in whatever way it is named."""
    form = request_form()
    assert form.fit(ASKS) == ASKS
    assert form.adapt(Refusal(text, param)) != ""
    wanted = {name: value for name, value in arguments.items() if value is not ...}
    assert form.fit(ASKS) == wanted
    form.keep()
    assert (
        streamer._RequestForm(types.SimpleNamespace(config=form._config, model="some-model")).fit(
            ASKS
        )
        == wanted
    )


FINAL_REFUSALS = [
    ("context_length_exceeded", "messages"),
    ("max_tokens is too large: 4096, at most 2048", "max_tokens"),  # as it was asked for
    ("max_tokens must be a number", "max_tokens"),
    ("the prompt was filtered", None),
]


@pytest.mark.parametrize(("text", "param"), FINAL_REFUSALS)
def test_request_form_leaves_other_refusals(text: str, param: str | None) -> None:
    """A refusal of what the user asked for, or of the prompt, changes nothing."""
    form = request_form()
    form.fit(ASKS)
    assert form.adapt(Refusal(text, param)) == ""
    assert form.fit(ASKS) == ASKS


def test_request_form_keeps_the_limit_that_a_user_has_set() -> None:
    """It is neither raised for a model that thinks, nor after an answer that was cut."""
    form = request_form(max_token=4096)
    form.fit(ASKS)
    assert form.enlarge() == ""
    form.adapt(Refusal(USE_OTHER, "max_tokens"))
    assert form.fit(ASKS)["max_completion_tokens"] == 4096
    assert form.cut_reason("length") == (
        "the model's answer was cut at llm.max_token=4096: a larger one allows longer answers"
    )


TOO_MANY = [
    ("max_tokens: 16384 > 8192, which is the maximum allowed for this model", None, 8192),
    ("This model supports at most 8192 completion tokens, you asked 16384", "max_tokens", 8192),
    ("`inputs` tokens + `max_new_tokens` must be <= 4000", None, None),
    ("'max_tokens' or 'max_completion_tokens' is too large: 16384", "max_tokens", None),
]


@pytest.mark.parametrize(("text", "param", "allowed"), TOO_MANY)
def test_request_form_asks_for_what_the_server_allows(
    text: str, param: str | None, allowed: int | None
) -> None:
    """A larger limit is asked for twice, and no larger than the server takes."""
    form = request_form()
    limits = []
    for _ in range(2):
        limits.append(form.fit(ASKS)["max_tokens"])
        form.enlarge()
    assert [*limits, form.fit(ASKS)["max_tokens"], form.enlarge()] == [4096, 16384, 65536, ""]
    form = request_form()
    form.fit(ASKS)
    form.enlarge()
    form.fit(ASKS)
    if allowed is None:
        with pytest.raises(streamer._GiveUp, match="=4096: the server allows no more"):
            form.adapt(Refusal(text, param))
    else:
        assert (
            form.adapt(Refusal(text, param)) == "the model server allows an answer of 8192 tokens"
        )
        assert (form.fit(ASKS)["max_tokens"], form.enlarge()) == (8192, "")


def test_model_call_is_emitted_whole(tmp_path: Path) -> None:
    """80 KB in one piece are several events, none cut; surrogates of two pieces are one letter."""

    async def call() -> list[tuple[str, str]]:
        run = Run(make_task(), Settings(workspace=tmp_path, max_event_bytes=1024))
        team: Any = types.SimpleNamespace(run=run)
        speaker = streamer._Speaker(team, "Engineer", "WriteCode")
        model_call = streamer._ModelCall(speaker, lambda: None)
        for text, reasoning in (("", "hm"), (text_of_80_kb, ""), ("\ud83c", ""), ("\udf89", "")):
            model_call.take(streamer.Chunk(text, reasoning))
        model_call.close()
        assert model_call.text == text_of_80_kb + "🎉"
        drafts = [report for report in run.outbox.take() if isinstance(report, streamer.Draft)]
        assert run.outbox.take() == []
        assert all(len(draft.payload.encode()) <= 1024 for draft in drafts)
        return [(draft.type, json.loads(draft.payload)["message"]) for draft in drafts]

    text_of_80_kb = "".join(map(chr, range(1, 0x2000))) * 4
    emitted = anyio.run(call)
    assert emitted[0] == ("REASONING", "hm")
    assert {kind for kind, _ in emitted[1:]} == {"TOKEN"}
    assert "".join(text for _, text in emitted[1:]) == text_of_80_kb + "🎉"


def children_of(pid: int) -> list[str]:
    """The programs that a process has started and that live, by name (of Linux; else nothing)."""
    lists = Path(f"/proc/{pid}/task").glob("*/children")
    children = [child for each in lists for child in each.read_text().split()]
    return [Path(f"/proc/{child}/comm").read_text().strip() for child in children]


@pytest.mark.main_path
def test_metagpt_runs_the_whole_company(metagpt: tuple[Client, ModelServer, Process]) -> None:
    """PRD, design, tasks, code and reviews, token by token; files, cost and progress reported."""
    client, model, server = metagpt
    task_id = client.create("Build a todo application with React [mark=whole]")
    record = client.watch(task_id)
    assert record.last_state["status"] == "SUCCEEDED", record.last_state
    assert record.last_state["final_result"]["end_reason"] == "idle"
    assert record.ids == list(range(1, len(record.ids) + 1))
    assert {event["event_type"] for event in record.events} == WHOLE_RUN
    speakers = {(event["agent_role"], event["payload"]["action"]) for event in record.of("TOKEN")}
    assert speakers == {
        ("ProductManager", "WritePRD"),
        ("Architect", "WriteDesign"),
        ("ProjectManager", "WriteTasks"),
        ("Engineer", "WriteCode"),
        ("Engineer", "WriteCodeReview"),
    }
    calls: dict[str, str] = defaultdict(str)
    for event in record.of("TOKEN"):
        calls[event["payload"]["call_id"]] += event["payload"]["message"]
    assert len(calls) == len(model.requests["whole"])
    assert (
        len(record.of("TOKEN")) < sum(len(text.split()) for text in calls.values()) / 5
    )  # merged by time
    assert sum("[CONTENT]" in text and "[/CONTENT]" in text for text in calls.values()) == 3
    files = {file["path"]: file["size"] for file in client.get(f"/api/tasks/{task_id}/artifacts")}
    written = {
        event["payload"]["path"]: event["payload"]["size"] for event in record.of("ARTIFACT")
    }
    assert files == written
    assert {"game.py", "main.py"} <= {path.rsplit("/", 1)[-1] for path in files}
    assert any(path.endswith(".mmd") for path in files)
    states = record.data("state")
    assert {0.2, 0.4, 0.5, 0.7, 0.9, 1.0} <= {state["progress"] for state in states}
    used = model.usage["whole"]
    cost = record.last_state["cost"]
    assert (cost["prompt_tokens"], cost["completion_tokens"]) == (
        used["prompt_tokens"],
        used["completion_tokens"],
    )
    assert 0 < cost["total_cost"] < cost["max_budget"] == 3.0
    assert children_of(server.popen.pid) == []  # git's, for each repository of a run
    assert server.output == b""
    others = [line for line in server.errors if " INFO streamer " not in line]
    assert [line for line in others if not line.startswith("streamer is at http://")] == []


# A server of several models; [llm=…] in a prompt names the task's.
SEVERAL_MODELS = """
import json, re, sys, types, streamer
models = json.loads(sys.argv[1])
class Company(streamer._Company):
    def __init__(self, engine, run):
        config = engine.config.model_copy(deep=True)
        config.llm = type(config.llm)(**models[re.search(r"\\[llm=([\\w-]+)\\]", run.prompt)[1]])
        super().__init__(types.SimpleNamespace(**{**vars(engine), "config": config}), run)
streamer._Company = Company
settings = streamer.Settings(port=0, max_running=12, model_timeout=4.0)
streamer.serve(streamer.create_app(settings), settings)
"""
WITHHELD = (
    r"the model's answer was withheld \(content_filter\): another prompt or llm.model may pass"
)
# model, mark, status; what a LOG says, or the reason; requests for code
ANSWERS: list[tuple[str, str, str, str, int]] = [
    (
        "gpt-4o",
        "[code=length once]",
        "SUCCEEDED",
        "was cut at 4096 tokens, the next may have 16384",
        2,
    ),
    (
        "gpt-4o",
        "[code=cut once]",
        "SUCCEEDED",
        r"broke off without a finish reason: .* \(attempt 1",
        2,
    ),
    (
        "gpt-4o",
        "[code=empty once]",
        "SUCCEEDED",
        r"answer was empty \(stop\): .* \(attempt 1 of 3",
        2,
    ),
    ("gpt-4o", "[code=error once]", "SUCCEEDED", r"answered 500: the engine died \(attempt 1", 2),
    (
        "gpt-4o",
        "[code=429 once]",
        "SUCCEEDED",
        r"slow down \(attempt 1 of 7, the next in 0.05 s\)",
        2,
    ),
    (
        "gpt-4o",
        "[code=silent once]",
        "SUCCEEDED",
        "said nothing for 4 s, the setting model_timeout",
        2,
    ),
    ("gpt-4o", "[code=huge]", "SUCCEEDED", "", 1),
    ("gpt-4o", "[code=thinks]", "SUCCEEDED", "", 1),
    (
        "gpt-4o",
        "[code=length]",
        "FAILED",
        "in WriteCode: .* cut at llm.max_token=65536: a larger",
        3,
    ),
    ("gpt-4o", "[code=cut]", "FAILED", r"in WriteCode: .* broke off .* \(attempt 3 of 3\)", 3),
    ("gpt-4o", "[code=content_filter]", "FAILED", f"in WriteCode: {WITHHELD}", 1),
    (
        "limited",
        "[code=length]",
        "FAILED",
        "in WriteCode: .* cut at llm.max_token=16384: a larger",
        1,
    ),
    (
        "whole",
        "[code=empty once]",
        "SUCCEEDED",
        r"answer was empty \(stop\): .* \(attempt 1 of 3",
        2,
    ),
    (
        "whole",
        "[code=length once]",
        "SUCCEEDED",
        "was cut at 4096 tokens, the next may have 16384",
        2,
    ),
    ("gpt-5", "", "SUCCEEDED", "does not take temperature: it is left out", 0),
    (
        "anthropic",
        "",
        "SUCCEEDED",
        r"answered 529: Overloaded \(attempt 1 of 7, the next in 1 s\)",
        0,
    ),
    ("ollama", "", "SUCCEEDED", r"answered 500: CUDA error \(attempt 1 of 7, the next in 1 s\)", 0),
    ("gpt-4o", "[code=endless]", "FAILED", "the model's answer does not end: check llm.model", 1),
    ("gpt-4o", "[code=redirect]", "FAILED", r"redirects \(307\): set .*llm.base_url to where", 1),
    (
        "gpt-4o",
        "[code=tool_calls once]",
        "SUCCEEDED",
        r"broke off \(tool_calls\): .* \(attempt 1",
        2,
    ),
]


def test_metagpt_takes_whole_answers_only(tmp_path: Path) -> None:
    """Broken, cut, empty, silent, refused: retried where it helps, else the setting is named."""
    with model_server() as (model, url):
        openai = {"api_type": "openai", "api_key": KEY, "base_url": url, "model": "gpt-4o"}
        server_url = url.removesuffix("/v1")
        models = {
            "gpt-4o": openai,
            "gpt-5": {**openai, "model": "gpt-5"},
            "limited": {**openai, "max_token": 16384},
            "whole": {**openai, "stream": False},
            "anthropic": {**openai, "api_type": "anthropic", "base_url": server_url},
            "ollama": {**openai, "api_type": "ollama", "base_url": f"{server_url}/api"},
        }
        environ = {"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": url}
        command = ("-c", SEVERAL_MODELS, json.dumps(models))
        with process(*command, cwd=tmp_path, environ=environ) as server:

            def run(number: int) -> Watcher:
                name, mark, _, _, _ = ANSWERS[number]
                prompt = f"[mark=answer{number}] [task=main.py] [llm={name}] {mark}"
                options = {"code_review": False, "implement": name not in ("anthropic", "ollama")}
                return server.client.watch(server.client.create(prompt, options=options))

            with ThreadPoolExecutor(len(ANSWERS)) as pool:
                records = list(pool.map(run, range(len(ANSWERS))))
            assert [line for line in server.errors if "Traceback" in line or "never" in line] == []
    for number, (name, mark, status, text, coded) in enumerate(ANSWERS):
        record = records[number]
        assert record.last_state["status"] == status, (name, mark, record.last_state)
        logs = [event["payload"]["message"] for event in record.of("LOG")]
        said = record.last_state["error_message"] or "\n".join(logs)
        assert re.search(text, said), (name, mark, said)
        assert model.coded[f"answer{number}"] == coded, (name, mark)
    calls = spoken(records[6], "TOKEN")
    assert f"```python\n{'x = 1  # ' * 9000}\n```" in calls.values()
    for number in (7, 15, 16):
        assert set(spoken(records[number], "REASONING").values()) == {"Let me think."}
        assert "Let me think." not in "".join(spoken(records[number], "TOKEN").values())
    limits = [json.loads(body)["max_tokens"] for body in model.bodies["answer0"]]
    assert limits == [4096, 4096, 4096, 4096, 16384]
    thinking = [json.loads(body) for body in model.bodies["answer14"]]
    assert [body.get("max_completion_tokens") for body in thinking[:3]] == [None, 32768, 32768]
    assert ["temperature" in body for body in thinking[:3]] == [True, True, False]
    waits = [state["waiting_on"] for state in records[5].data("state") if "waiting_on" in state]
    assert any(wait["action"] == "WriteCode" and wait["seconds"] >= 1 for wait in waits)


def spoken(record: Watcher, kind: str) -> dict[str, str]:
    """call_id → what was said in it."""
    calls: dict[str, str] = defaultdict(str)
    for event in record.of(kind):
        calls[event["payload"]["call_id"]] += event["payload"]["message"]
    return calls


def test_metagpt_writes_only_below_its_workspace(
    metagpt: tuple[Client, ModelServer, Process],
) -> None:
    """Nothing appears beside the workspace: no configuration, no log, no project."""
    client, _, server = metagpt
    client.watch(client.create("[mark=inside]", options={"implement": False}))
    folder = server.cwd
    assert [path.name for path in folder.iterdir()] == ["workspace"]
    tasks = {each["id"] for each in client.get("/api/tasks?page_size=100")["items"]}
    assert {path.name for path in (folder / "workspace").iterdir()} <= tasks | {".metagpt"}


FAILURES: list[tuple[str, dict[str, Any], str, str]] = [
    (
        "[401]",
        {},
        "FAILED",
        r"ProductManager failed in WritePRD: .* rejected the key \(401\): check OPENAI_API_KEY",
    ),
    ("[404]", {}, "FAILED", r"has no model 'gpt-4o' \(404\): check OPENAI_MODEL"),
    (
        "[garbage]",
        {},
        "FAILED",
        r"^ProductManager failed in WritePRD: after 6 attempts the model's answer has not the form "
        r"asked; a stronger model \(llm\.model\) may keep to the form asked\. "
        r"It begins 'I would rather not answer in JSON\.'\. "
        r"Expecting value: line 1 column 1 \(char 0\)$",
    ),
    ("[garbage once]", {}, "SUCCEEDED", r"idle"),
    ("[503 once]", {}, "SUCCEEDED", r"idle"),
    ("[no usage]", {}, "SUCCEEDED", r"idle"),
    ("", {"investment": 0.001}, "FAILED", r"the budget is spent: \$0\.0\d+ of \$0\.001"),
    ("", {"n_round": 2}, "SUCCEEDED", r"rounds"),
    ("[slow]", {"timeout": 2}, "FAILED", r"^timed out after 2 s \(options\.timeout\)$"),
    (
        "[task=.]",
        {},
        "FAILED",
        r"^Engineer failed in WriteCode.*: the file \w+ cannot be used: Is a directory$",
    ),
    (
        "[task=../../../../escaped.py]",
        {},
        "FAILED",
        r"the model named a file outside the task's workspace",
    ),
    ("[task=/etc/hostname]", {}, "FAILED", r"the model named a file outside the task's workspace"),
    ("", {"run_tests": True, "n_round": 8}, "SUCCEEDED", r"idle|rounds"),
    (
        "[task=../.git/config]",
        {},
        "FAILED",
        r"the model named a file of git's own: '.*/\.git/config'",
    ),
    ("[task=../.G\u200cit/commondir]", {}, "FAILED", r"the model named a file of git's own: "),
    ("[task=../.gitattributes]", {}, "SUCCEEDED", r"idle"),
    ("[task=游戏.py]", {}, "SUCCEEDED", r"idle"),
    ("[blank lines]", {"code_review": False}, "SUCCEEDED", r"idle"),
    ("[unclosed once]", {}, "SUCCEEDED", r"idle"),
    (
        "[task=none]",
        {},
        "FAILED",
        r"^Engineer failed: the model's list of tasks names no file; "
        r"a stronger model \(llm\.model\) may ",
    ),
    (
        f"[task={'x' * 300}.py]",
        {},
        "FAILED",
        r"^Engineer failed: the model named a file that cannot be: 'x{64}…'$",
    ),
    ("[task=HEAD]", {}, "FAILED", r"the model named a file of git's own: '.*/HEAD'"),
]


def test_metagpt_failures_end_with_a_reason(metagpt: tuple[Client, ModelServer, Process]) -> None:
    """Each way to fail ends in the right status, with a reason to act on, and no key anywhere."""
    client, model, server = metagpt

    def run(number: int) -> Watcher:
        prompt, options, _, _ = FAILURES[number]
        return client.watch(client.create(f"[mark=fail{number}] {prompt}", options=options))

    with ThreadPoolExecutor(len(FAILURES)) as pool:
        records = list(pool.map(run, range(len(FAILURES))))
    model.slow.set()
    model.slow.clear()
    for (prompt, options, status, reason), record in zip(FAILURES, records, strict=True):
        state = record.last_state
        assert state["status"] == status, (prompt, options, state)
        assert re.search(reason, state["error_message"] or state["final_result"]["end_reason"]), (
            prompt,
            state,
        )
        if status == "FAILED" and "timed out" not in reason:
            (error,) = record.of("ERROR")
            assert error["agent_role"] is not None
            assert error["payload"]["message"][:300] == state["error_message"]
        assert sum(event["event_type"] in TERMINAL for event in record.events) == 1
        assert record.events[-1]["event_type"] == (
            "TASK_COMPLETE" if status == "SUCCEEDED" else "TASK_ERROR"
        )
        assert KEY not in json.dumps(record.messages)
    assert KEY not in "".join(server.errors)
    assert len(model.requests["fail0"]) == 1  # a rejected key is not tried again
    assert len(model.requests["fail2"]) == 6
    retried = [
        event
        for event in records[4].of("LOG", "TOKEN")
        if event["payload"].get("level") in ("WARNING", None)
    ]
    assert "answered 503: " in retried[0]["payload"]["message"]  # before the attempt that succeeds
    assert records[5].last_state["cost"]["completion_tokens"] > 0  # estimated
    assert [*server.cwd.rglob("escaped.py")] == []
    roles = {event["agent_role"] for event in records[12].of("AGENT_START")}
    assert roles == {"ProductManager", "Architect", "ProjectManager", "Engineer", "QaEngineer"}
    written = [Path(path).name for path in records[16].last_state["final_result"]["files"]]
    assert [name for name in written if name.endswith(".py")] == ["游戏.py"]


@pytest.mark.parametrize(
    "name",
    [
        ".git",
        ".GIT",
        ".git ",
        ".git. .",
        ".git::$INDEX_ALLOCATION",
        "git~1",
        "GIT~12",
        ".g\u200cit",
        "．ｇｉｔ",
    ],
)
def test_git_names_in_every_spelling_are_refused(name: str) -> None:
    """What HFS+, NTFS or a file system that ignores case takes for git's folder."""
    assert streamer._is_git_name(name)


@pytest.mark.parametrize(
    "name", [".gitignore", ".gitattributes", "git", "a.git", ".github", "游戏.py", "..", ""]
)
def test_git_names_are_no_more_than_that(name: str) -> None:
    """Names that only resemble git's are a project's own."""
    assert not streamer._is_git_name(name)


PATTERNS = [
    (r"```.*?\s+(.*?)```", 1, ["```", "`", "python", " ", "\n", "x"]),
    (r"```python.*?\s+(.*?)```", 1, ["```", "`", "```python", "python", " ", "\n", "x"]),
    (r"\[CONTENT\](.*?)\[/CONTENT\]", 1, ["[CONTENT]", "[/CONTENT]", "[", "x", "\n"]),
    (r"\[CONTENT\]([\s\S]*)\[/CONTENT\]", 1, ["[CONTENT]", "[/CONTENT]", "[", "x", "\n"]),
    (r"\s*(.*=.*)?(\[.*\])", 2, ["[", "]", "=", " ", "x", "\n"]),
    (r"(.*?```python.*?\s+)?(?P<code>.*)(```.*?)", "code", ["```", "```python", " ", "\n", "x"]),
    (r"(.*?```python.*?\s+)?(?P<code>.*)", "code", ["```", "```python", " ", "\n", "x"]),
]


@pytest.mark.parametrize(("pattern", "group", "tokens"), PATTERNS)
def test_linear_pattern_finds_what_the_original_finds(
    pattern: str, group: int | str, tokens: list[str]
) -> None:
    """MetaGPT's patterns that can hold the interpreter, and what replaces them, on random texts."""
    chance = random.Random(pattern)
    for _ in range(5000):
        text = "".join(chance.choices(tokens, k=chance.randrange(12)))
        expected = re.search(pattern, text, re.DOTALL)
        found = re.search(streamer.linear_pattern(pattern), text, re.DOTALL)
        assert (found and found[group]) == (expected and expected[group]), text


# What MetaGPT's parsers make of 100 KB: a short result or its type, the same as without streamer.
# The last of them fills in a list from XML.
PARSERS = """
import asyncio, json, types
from pathlib import Path
import streamer
engine = streamer.load_metagpt(Path("workspace").absolute())
from metagpt.actions.action_node import ActionNode
from metagpt.utils.common import CodeParser, OutputParser
from metagpt.utils.repair_llm_raw_output import extract_content_from_output
def fill(text):
    async def aask(prompt, images=None):
        return text
    field = ActionNode(key="field", expected_type=list, instruction="", example="")
    node = ActionNode.from_children("node", [field])
    node.llm = types.SimpleNamespace(aask=aask)
    return asyncio.run(node.xml_fill("")).get("field", "none")
parsers = [
    lambda text: CodeParser.parse_code("", text),
    OutputParser.parse_code,
    lambda text: CodeParser.parse_file_list("", text),
    OutputParser.parse_file_list,
    OutputParser.parse_python_code,
    OutputParser.extract_content,
    extract_content_from_output,
    fill,
]
texts = {
    "no end of blanks": "```python\\nimport os" + "\\n" * 100_000,
    "no end of fences": "```python" * 11_000,
    "no end of content": "[CONTENT]{" * 10_000,
    "no end of lists": "=[]" + "[" * 50_000 + "]" * 50_000,
    "no end of fields": "<field>" * 14_000,
    "a program": "<field>[__import__('os').mkdir('ran')]</field>",
    "code": "```python\\na = [1]\\n```" + "\\n" * 100_000,
}
for name, text in texts.items():
    for parse in parsers:
        try:
            result = parse(text)
            short = result if len(str(result)) < 20 else type(result).__name__
        except Exception as error:
            short = type(error).__name__
        print(json.dumps([name, short]))
"""


def test_metagpt_parsers_stand_any_answer(tmp_path: Path) -> None:
    """100 KB that never close what they open take no minutes, and no answer is run as Python."""
    environ = {"OPENAI_API_KEY": KEY}
    with process("-c", PARSERS, cwd=tmp_path, environ=environ) as script:
        script.popen.wait(4 * TIMEOUT)
        assert script.wait() == 0, "".join(script.errors)
    assert not (tmp_path / "ran").exists()
    found: dict[str, list[Any]] = defaultdict(list)
    for line in script.output.splitlines():
        name, result = json.loads(line)
        found[name].append(result)
    open_end = ["str", "Exception", "Exception", "list", "ValueError", "ValueError", "str", "none"]
    lists = [
        "str",
        "Exception",
        "SyntaxError",
        "SyntaxError",
        "ValueError",
        "ValueError",
        "str",
        "none",
    ]
    program = [
        "str",
        "Exception",
        "ValueError",
        "ValueError",
        "ValueError",
        "ValueError",
        "str",
        [],
    ]
    code = "a = [1]\n"
    assert found == {
        "no end of blanks": [
            *open_end[:4],
            "str",
            *open_end[5:],
        ],  # what follows the fence is Python
        "no end of fences": open_end,
        "no end of content": lists,  # of CONTENT in brackets
        "no end of lists": lists,
        "no end of fields": open_end,
        "a program": program,
        "code": [code, code, [1], [1], code, "ValueError", "str", "none"],
    }


def test_metagpt_program_of_the_team_sees_no_key(
    metagpt: tuple[Client, ModelServer, Process],
) -> None:
    """With run_tests, what the model wrote is run; the model's key is not in its environment."""
    client, _, _ = metagpt
    task_id = client.create("Build [mark=environ]", options={"run_tests": True, "n_round": 8})
    client.watch(task_id, "types=RESULT")
    paths = [file["path"] for file in client.get(f"/api/tasks/{task_id}/artifacts")]
    (written,) = [path for path in paths if path.endswith("environ.txt")]
    text = client.http.get(f"/api/tasks/{task_id}/artifacts/{written}").text
    environ = ast.literal_eval(text)
    assert {"PATH", "HOME", "PYTHONPATH"} <= set(environ)
    assert not {"PYTHONWARNINGS", "OPENAI_BASE_URL", "GIT_DIR", *SECRETS} & set(environ)
    assert [secret for secret in (KEY, *SECRETS.values()) if secret in text] == []


def lives(pid: int) -> bool:
    """Whether a process runs; one that ended but was not waited for does not."""
    found = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], stdout=subprocess.PIPE)
    return found.stdout.strip()[:1] not in (b"", b"Z")


@pytest.mark.parametrize("mark", ["leaves", "stays"])
def test_metagpt_programs_of_the_team_end_with_their_run(
    metagpt: tuple[Client, ModelServer, Process], mark: str
) -> None:
    """With run_tests, what a test has started is ended with it, or with the cancel of the run."""
    client, _, server = metagpt
    options = {"run_tests": True, "n_round": 8}
    watcher = client.follow(client.create(f"Build [mark={mark}]", options=options))
    folder = server.cwd / "workspace" / watcher.task_id
    found = wait_until(lambda: [*folder.glob("**/left.txt")])
    if mark == "stays":
        pids = [int(pid) for pid in found[0].read_text().split()]
        assert [lives(pid) for pid in pids] == [True] * 3
        client.post(f"/api/tasks/{watcher.task_id}/cancel")
    watcher.join()
    pids = [int(pid) for pid in found[0].read_text().split()]
    assert [lives(pid) for pid in pids] == [False] * 3
    ended = {"leaves": "TASK_COMPLETE", "stays": "TASK_CANCELLED"}[mark]
    assert watcher.events[-1]["event_type"] == ended
    assert client.get("/healthz")["abandoned"] == 0


def test_memory_is_hidden_from_other_programs(tmp_path: Path) -> None:
    """Linux lets no program of the same user read what is not dumpable: /proc/…/environ, mem."""
    code = "import ctypes, streamer; streamer._hide_memory(); "
    code += "raise SystemExit(ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))"
    with process("-c", code, cwd=tmp_path) as script:
        assert script.wait() == 0, "".join(script.errors)


def test_git_reads_no_configuration_and_knows_its_author(tmp_path: Path) -> None:
    """Without HOME, and with a hostile configuration and another repository in the environment."""
    given = {"PATH": os.environ["PATH"], **hostile_git(tmp_path)}
    environ = streamer.git_environ(given)

    def git(*command: str) -> str:
        done = subprocess.run(
            ["git", *command], cwd=project, env=environ, check=True, stdout=subprocess.PIPE
        )
        return done.stdout.decode()

    project = tmp_path / "project"
    project.mkdir()
    git("init", "--quiet")
    (project / "data.json").write_text("{}")
    git("add", ".")
    git("commit", "--quiet", "--message", "first")
    assert git("log", "--format=%an %ae %cn %ce", "--name-only").split() == [
        *("streamer", "streamer@localhost", "streamer", "streamer@localhost"),
        "data.json",
    ]
    scopes = {line.split("\t")[0] for line in git("config", "--list", "--show-scope").splitlines()}
    assert scopes == {"command", "local"}
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "other").exists()


def test_git_that_is_missing_is_said_at_the_start(tmp_path: Path) -> None:
    """Before anything is served, with what to install; exit code 2."""
    environ = {"OPENAI_API_KEY": KEY, "PATH": str(tmp_path)}
    with process(SERVER, "--port", "0", cwd=tmp_path, environ=environ) as server:
        assert server.wait() == 2
    assert "git is not on PATH, and MetaGPT needs it. Install it" in "".join(server.errors)


# MetaGPT without streamer, driven as its own software_company.py does it; but it installs nothing.
ALONE = """
import asyncio, json, os, sys
from pathlib import Path
import streamer
engine = streamer._import_metagpt(Path("metagpt").absolute(), streamer.model_config(os.environ))
engine.RunCode._install_dependencies = staticmethod(lambda working_directory, env: None)
roles = engine.roles
for prompt, options in json.loads(sys.argv[1]):
    config = engine.config.model_copy(deep=True)
    config.update_via_cli("", options["project_name"], False, "", 0)
    config.workspace.path = Path("workspace", options["project_name"]).absolute()
    team = engine.Team(context=engine.Context(config=config))
    team.hire([roles.ProductManager(), roles.Architect(), roles.ProjectManager()])
    team.hire([roles.Engineer(n_borg=5, use_code_review=options["code_review"])])
    if options["run_tests"]:
        team.hire([roles.QaEngineer()])
    team.invest(3.0)
    team.run_project(prompt)
    asyncio.run(team.run(n_round=options["n_round"]))
"""
ALIKE: list[tuple[str, dict[str, Any]]] = [
    ("Build [mark=alike0]", {"code_review": True, "run_tests": False, "n_round": 5}),
    ("游戏 [mark=alike1] [garbage once]", {"code_review": False, "run_tests": True, "n_round": 8}),
]


def test_metagpt_asks_and_writes_what_it_does_alone(
    metagpt: tuple[Client, ModelServer, Process], tmp_path: Path
) -> None:
    """Its requests are byte for byte those of MetaGPT without streamer, and so are the files."""
    client, observed, server = metagpt
    tasks = [
        (prompt, {**options, "project_name": f"alike{number}"})
        for number, (prompt, options) in enumerate(ALIKE)
    ]
    ids = [client.create(prompt, options=options) for prompt, options in tasks]
    with ThreadPoolExecutor(len(ids)) as pool:
        records = list(pool.map(client.watch, ids))
    with model_server() as (alone, url):
        environ = {"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": url}
        with process("-c", ALONE, json.dumps(tasks), cwd=tmp_path, environ=environ) as script:
            script.popen.wait(4 * TIMEOUT)  # it loads MetaGPT, and runs one by one
            assert script.wait() == 0, "".join(script.errors)

    def asked(bodies: list[bytes]) -> list[bytes]:
        """In any order, as roles run concurrently; streamer alone asks for the usage."""
        return sorted(re.sub(rb',"stream_options":{[^}]*}', b"", body) for body in bodies)

    def written(folder: Path) -> dict[str, list[bytes]]:
        """Some names are the time; requirements.txt is a set that MetaGPT writes in any order."""
        return {
            re.sub(r"\d{14,}", "<time>", path): sorted((folder / path).read_bytes().splitlines())
            for path, _, _ in streamer.list_files(folder)
        }

    folder = server.cwd / "workspace"
    for (_, options), task_id, record in zip(tasks, ids, records, strict=True):
        name = options["project_name"]
        assert record.last_state["status"] == "SUCCEEDED", record.last_state
        assert len(alone.bodies[name]) >= 6
        assert asked(observed.bodies[name]) == asked(alone.bodies[name])
        assert written(folder / task_id) == written(tmp_path / "workspace" / name)


# A server; when it has stopped, the prices of some models.
PRICED = """
import json, sys, streamer
settings = streamer.Settings(port=0)
streamer.logging.basicConfig(level="INFO")
streamer.serve(streamer.create_app(settings), settings)
engine = streamer.load_metagpt(settings.workspace)
for api_type, model, plan, price in json.loads(sys.argv[1]):
    given = {"api_type": api_type, "model": model, "pricing_plan": plan, "api_key": "k"}
    config = type(engine.config.llm)(**given)
    print(json.dumps(streamer.model_price(engine, config, price)))
"""
PRICES: list[tuple[str, str, str | None, tuple[float, ...], Any]] = [
    ("openai", "gpt-4o", None, (), {"prompt": 0.005, "completion": 0.015}),
    ("openai", "gpt-4o", None, (1, 1), {"prompt": 0.005, "completion": 0.015}),  # its own price
    ("openai", "gpt-5", None, (), None),
    ("openai", "gpt-5", None, (1.25, 10), {"prompt": 0.00125, "completion": 0.01}),
    ("openai", "gpt-5", "gpt-4o", (), {"prompt": 0.005, "completion": 0.015}),
    ("openai", "gpt-4o", "unknown", (), None),
    ("anthropic", "claude-sonnet-4", None, (3, 15), {"prompt": 0.003, "completion": 0.015}),
    ("ollama", "llama3", None, (), {"prompt": 0.0, "completion": 0.0}),
    ("open_llm", "mine", None, (1, 1), {"prompt": 0.0, "completion": 0.0}),
]


def test_metagpt_model_without_a_price(tmp_path: Path) -> None:
    """The price is MetaGPT's, its plan's, a local server's, the setting's, or unknown: then the
    cost is null, and the server's log says so once."""
    with model_server() as (model, url):
        environ = {"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": url, "OPENAI_MODEL": "gpt-5"}
        cases = json.dumps([case[:4] for case in PRICES])
        with process("-c", PRICED, cases, cwd=tmp_path, environ=environ) as server:
            client = server.client
            options = {"implement": False, "investment": 0.001}
            record = client.watch(client.create("[mark=priceless]", options=options))
            metrics = client.http.get("/metrics").text
            assert server.stop(signal.SIGINT) == 0
        used = model.usage["priceless"]
    assert [json.loads(line) for line in server.output.splitlines()] == [case[4] for case in PRICES]
    cost = {
        "prompt_tokens": used["prompt_tokens"],
        "completion_tokens": used["completion_tokens"],
        "total_cost": None,
        "max_budget": 0.001,
        "by_role": record.last_state["cost"]["by_role"],
    }
    assert record.last_state["cost"] == record.last_state["final_result"]["cost"] == cost
    assert {role: own["total_cost"] for role, own in cost["by_role"].items()} == dict.fromkeys(
        ("ProductManager", "Architect", "ProjectManager")
    )
    message = record.of("RESULT")[0]["payload"]["message"]
    assert re.fullmatch(r"\d+ files, \d+ rounds, price unknown", message)
    assert record.data("state")[0]["cost"]["total_cost"] == 0  # no model was used yet
    assert "\nstreamer_model_cost_dollars_total 0" in metrics
    warnings = [line for line in server.errors if line.startswith(("WARNING:", "ERROR:"))]
    assert len(warnings) == 1
    assert "no price is known for model='gpt-5'" in warnings[0]
    assert "--price 1.25,10" in warnings[0]
    assert "llm.pricing_plan" in warnings[0]
    logged = [event["payload"] for event in record.of("LOG")]
    assert "not found in TOKEN_COSTS" not in "".join(each["message"] for each in logged)
    assert [each["message"] for each in logged if "cost" in each["message"]] == []


def test_metagpt_budgets_hold_for_the_task(
    metagpt: tuple[Client, ModelServer, Process], tmp_path: Path
) -> None:
    """A run that spent its budget asks nothing more, nor does the next run of the same task."""
    client, model, _ = metagpt
    spent = {
        "spent0": ({"investment": 0.001}, r"\$0\.0\d+ of \$0\.001; a larger options\.investment"),
        "spent1": ({"token_budget": 1}, r"\d+ of 1 tokens; a larger options\.token_budget allows"),
    }

    def run(mark: str) -> tuple[dict[str, Any], dict[str, Any]]:
        task_id = client.create(f"[mark={mark}]", options=spent[mark][0])
        first = client.watch(task_id).last_state
        assert client.post(f"/api/tasks/{task_id}/run?restart=true").status_code == 202
        return first, client.watch(task_id).last_state

    with ThreadPoolExecutor(2) as pool:
        for mark, states in zip(spent, pool.map(run, spent), strict=True):
            for state in states:
                assert state["status"] == "FAILED"
                assert re.search(f"the budget is spent: {spent[mark][1]}", state["error_message"])
            used = model.usage[mark]
            for state in states:
                assert state["cost"]["prompt_tokens"] == used["prompt_tokens"]
                assert state["cost"]["completion_tokens"] == used["completion_tokens"]
            assert len(model.requests[mark]) == 1


# The command line, on a clock that is ten times as fast: what it says it waits for is unchanged.
HURRIED = """
import asyncio, sys, streamer
sleep = asyncio.sleep
asyncio.sleep = lambda seconds, result=None: sleep(seconds / 10, result)
sys.exit(streamer.main())
"""


def test_metagpt_server_that_is_down_is_said_at_once(tmp_path: Path) -> None:
    """Every failed attempt is a LOG when it fails; after five the task is FAILED and says where."""
    with loopback() as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/v1"
        environ = {"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": url, "OPENAI_MODEL": "some-model"}
        with process("-c", HURRIED, "--port", "0", cwd=tmp_path, environ=environ) as server:
            client = server.client
            record = client.watch(client.create())
    attempts = [event for event in record.of("LOG") if event["payload"]["level"] == "WARNING"]
    said = r"\(attempt (\d) of 5, the next in (\d) s\)"
    numbers = [re.findall(said, event["payload"]["message"]) for event in attempts]
    assert numbers == [[("1", "1")], [("2", "2")], [("3", "4")], [("4", "8")]]
    times = [datetime.fromisoformat(event["timestamp"]).timestamp() for event in attempts]
    waits = [after - before for before, after in itertools.pairwise(times)]
    assert [wait >= least for wait, least in zip(waits, (0.1, 0.2, 0.4), strict=True)] == [True] * 3
    assert f"the model API at {url} cannot be reached" in record.last_state["error_message"]


def test_metagpt_isolates_concurrent_tasks(metagpt: tuple[Client, ModelServer, Process]) -> None:
    """Eight teams at once, each answer needing a retry: no marker, file, prompt or cost crosses."""
    client, model, _ = metagpt
    marks = [f"iso{number}" for number in range(8)]

    def run(mark: str) -> tuple[str, Watcher]:
        task_id = client.create(f"Build [mark={mark}] [garbage once]")
        return task_id, client.watch(task_id)

    with ThreadPoolExecutor(len(marks)) as pool:
        results = dict(zip(marks, pool.map(run, marks), strict=True))
    for mark, (task_id, record) in results.items():
        assert record.last_state["status"] == "SUCCEEDED", record.last_state
        foreign = [f"[mark={other}]" for other in marks if other != mark]
        texts = [json.dumps(record.messages), *model.requests[mark]]
        texts += [
            client.http.get(f"/api/tasks/{task_id}/artifacts/{file['path']}").text
            for file in client.get(f"/api/tasks/{task_id}/artifacts")
        ]
        assert not [(name, text[:80]) for name in foreign for text in texts if name in text]
        assert sum(f"[mark={mark}]" in text for text in texts) > 10
        used = model.usage[mark]
        cost = record.last_state["cost"]
        assert (cost["prompt_tokens"], cost["completion_tokens"]) == (
            used["prompt_tokens"],
            used["completion_tokens"],
        )
    # One client, one task.
    assert [marks for _, marks in model.connections.values() if len(marks) > 1] == []


def acts(record: Watcher) -> list[tuple[str, str]]:
    """Who did what, in order."""
    return [
        (event["agent_role"], event["payload"]["action"]) for event in record.of("AGENT_COMPLETE")
    ]


def test_metagpt_observes_any_team(metagpt: tuple[Client, ModelServer, Process]) -> None:
    """Its tutorials, wrapped in a function: tokens, messages, progress and cost by their names."""
    client, model, _ = metagpt
    assert client.get("/healthz")["teams"] == list(TEAM_NAMES)
    teams = {"multi": 5, "debate": 4, "single": 3, "shared": 2, "human": 3, "raw": 3}

    def run(name: str) -> Watcher:
        options = {"team": name, "n_round": teams[name]}
        answers = ["not whole"] if name == "human" else []
        return answering(client, client.create(f"[mark={name}]", options=options), *answers)

    with ThreadPoolExecutor(len(teams)) as pool:
        records = dict(zip(teams, pool.map(run, teams), strict=True))
    for name, record in records.items():
        assert record.last_state["status"] == "SUCCEEDED", record.last_state
        cost = record.last_state["cost"]
        for kind in ("prompt_tokens", "completion_tokens"):
            assert cost[kind] == model.usage[name][kind] > 0
            assert cost[kind] == sum(own[kind] for own in cost["by_role"].values())
        said = {(event["agent_role"], event["payload"]["action"]) for event in record.of("TOKEN")}
        assert {role for role, _ in said} == set(cost["by_role"])
        assert said <= set(acts(record))
    tested = [("Bob", "SimpleWriteTest"), ("Charlie", "SimpleWriteReview")]
    assert acts(records["multi"]) == [("Alice", "SimpleWriteCode"), *tested, *tested]
    assert acts(records["debate"]) == [("Alex", "AlexSay"), ("Bob", "BobSay")] * 2
    assert acts(records["single"]) == [("Alice", "SimpleWriteCode"), ("Alice", "SimpleRunCode")]
    assert acts(records["human"]) == [("Alice", "SimpleWriteCode"), *tested]
    prompt = records["debate"].of("MESSAGE")[0]
    assert (prompt["agent_role"], prompt["payload"]["send_to"]) == (None, ["Alex"])
    causes = [event["payload"]["cause_by"] for event in records["debate"].of("MESSAGE")]
    assert causes == ["UserRequirement", "AlexSay", "BobSay", "AlexSay", "BobSay"]
    asked = {json.loads(body)["model"] for body in model.bodies["debate"]}
    assert asked == {"gpt-4o", "gpt-4-turbo"}
    by_role = records["debate"].last_state["cost"]["by_role"]
    price = {"Alex": (0.01, 0.03), "Bob": (0.005, 0.015)}
    for role, own in by_role.items():
        dollars = own["prompt_tokens"] * price[role][0] + own["completion_tokens"] * price[role][1]
        assert own["total_cost"] == pytest.approx(dollars / 1000, abs=1e-6)
    assert {state["progress"] for state in records["debate"].states} >= {0.25, 0.5, 0.75, 1.0}
    ends = {
        name: record.last_state["final_result"]["end_reason"] for name, record in records.items()
    }
    idle = dict.fromkeys(("single", "shared", "raw"), "idle")
    assert ends == {**dict.fromkeys(teams, "rounds"), **idle}
    done = [("Liz", "Late"), ("Lou", "LouSay"), ("Ray", "Raw")]  # Lou was hired in mid-run
    assert sorted(acts(records["raw"])) == done
    code = [event["payload"]["message"] for event in records["raw"].of("TOKEN")]
    block = "```python\nprint('[mark=raw]')\n```"
    assert Counter(code) == {
        block: 2,
        '{"language":"python","code":"print(\'[mark=raw]\')\\n"}': 1,
    }
    (question,) = records["human"].of("QUESTION")
    assert question["agent_role"] == "Charlie"
    assert "Review the test cases" in question["payload"]["message"]
    assert records["human"].of("MESSAGE")[-1]["payload"]["content"] == "not whole"


def test_metagpt_asks_a_person_for_whatever_reads_its_input(
    metagpt: tuple[Client, ModelServer, Process],
) -> None:
    """MetaGPT's questions and a role's own input() are questions of the task, of the role."""
    client, _, _ = metagpt
    task_id = client.create(options={"team": "asks"})
    record = answering(client, task_id, "confirm it", "7", " 2 ", "two\nlines", "no")
    assert record.last_state["status"] == "SUCCEEDED", record.last_state
    assert [event["agent_role"] for event in record.of("QUESTION")] == ["Ada"] * 5
    (message,) = record.of("MESSAGE")[1:]
    answers = ast.literal_eval(message["payload"]["content"])
    assert answers == ["confirm it", True, 2, "two\nlines", "no"]
    assert {state["progress"] for state in record.states} == {0.0, 0.7, 1.0}  # its own
    record = answering(client, client.create(options={"team": "asks"}), "exit")
    assert record.last_state["status"] == "CANCELLED"
    assert record.events[-1]["payload"]["message"] == "stopped by a person, who answered exit"


def test_metagpt_team_that_cannot_be_made_says_why(
    metagpt: tuple[Client, ModelServer, Process],
) -> None:
    """A team's function that fails, or returns something else, is the reason, with its name."""
    client, _, _ = metagpt
    reasons = {
        "nothing": "the function of 'nothing' must return MetaGPT's Team, or roles, not NoneType",
        "broken": "the function of 'broken' raised ValueError: no such thing",
    }
    for name, reason in reasons.items():
        state = client.watch(client.create(options={"team": name})).last_state
        assert (state["status"], state["error_message"]) == ("FAILED", f"the team failed: {reason}")
    options = {"team": "debate", "approve": ["AlexSay", "EveSay"]}
    state = client.watch(client.create(options=options)).last_state
    reason = "the team 'debate' has no action 'EveSay'; its actions are AlexSay, BobSay"
    assert state["error_message"] == f"the team failed: options.approve: {reason}"


@pytest.mark.parametrize(
    ("team", "reason"),
    [
        ("late_team:no_such", "late_team has no function no_such"),
        ("late_team.part:make", "ModuleNotFoundError: No module named 'late_team.part'"),
    ],
)
def test_metagpt_team_that_cannot_be_imported_is_said(
    tmp_path: Path, team: str, reason: str
) -> None:
    """Once MetaGPT is loaded: by /healthz, in the log, and as the reason of every task."""
    (tmp_path / "late_team.py").write_text("import metagpt.team\n")
    command = ("--port", "0", "--teams", f"own={team}")
    with process(SERVER, *command, cwd=tmp_path, environ={"OPENAI_API_KEY": KEY}) as server:
        state = server.client.watch(server.client.create()).last_state
        health = server.client.http.get("/healthz")
    said = f"MetaGPT could not be loaded: the team 'own' ({team}) cannot be imported: {reason}"
    assert state["error_message"].startswith(said)
    assert (health.status_code, health.json()["engine"][: len(said)]) == (503, said)


def test_metagpt_passes_a_remark_on(metagpt: tuple[Client, ModelServer, Process]) -> None:
    """What a person says after an action is in the next role's prompt, with the document."""
    client, model, _ = metagpt

    def run(mark: str, options: dict[str, Any], *answers: str) -> Watcher:
        task_id = client.create(f"Build [mark={mark}]", options={"code_review": False, **options})
        return answering(client, task_id, *answers)

    company = {"approve": ["WritePRD", "WriteDesign", "WriteTasks", "WriteCode"]}
    own = {"approve": ["AlexSay"], "team": "debate", "n_round": 2}
    form = {"approve": ["Form"], "team": "form", "n_round": 2}
    with ThreadPoolExecutor(4) as pool:
        futures = [
            pool.submit(run, "approve0", company, "use SQLite", "Continue", "in C", "continue"),
            pool.submit(run, "approve1", company, "stop: too dear"),
            pool.submit(run, "approve2", own, "be kind"),
            pool.submit(run, "approve3", form, "or green"),
        ]
        whole, stopped, debate, formed = [future.result() for future in futures]
    remark = streamer.REMARK
    assert [remark in prompt for prompt in model.requests["approve0"]] == [
        False,
        True,
        False,
        True,
        True,
    ]
    assert f'"{remark}": "use SQLite"' in model.requests["approve0"][1]
    assert "in C" in model.requests["approve0"][3]
    assert whole.last_state["status"] == "SUCCEEDED"
    choices = [event["payload"]["free_text"] for event in whole.of("QUESTION")]
    assert choices == [True, True, True, False]
    prd = next(path for path in whole.last_state["final_result"]["files"] if "/docs/prd/" in path)
    kept = client.get(f"/api/tasks/{whole.task_id}/artifacts/{prd}")
    assert kept[remark] == "use SQLite"
    assert stopped.last_state["status"] == "CANCELLED"
    reason = "stopped by a person after WritePRD: stop: too dear"
    assert stopped.events[-1]["payload"]["message"] == reason
    assert len(model.requests["approve1"]) == 1
    assert [f"{remark}: be kind" in prompt for prompt in model.requests["approve2"]] == [
        False,
        True,
    ]
    for record in (debate, formed):
        assert record.last_state["status"] == "SUCCEEDED", record.last_state
    assert "'remark_of_the_user': 'or green'" in model.requests["approve3"][1]


def test_metagpt_isolates_teams_of_several_kinds(
    metagpt: tuple[Client, ModelServer, Process],
) -> None:
    """Eight at once, own models included: no marker crosses, and costs are each one's own."""
    client, model, _ = metagpt
    kinds = [None, "multi", "debate", None, "multi", "debate", "shared", "shared"]
    marks = [f"kind{number}" for number in range(8)]

    def run(number: int) -> Watcher:
        options = {"team": kinds[number], "n_round": 4}
        return client.watch(client.create(f"Build [mark={marks[number]}]", options=options))

    with ThreadPoolExecutor(len(marks)) as pool:
        records = list(pool.map(run, range(len(marks))))
    for mark, record in zip(marks, records, strict=True):
        assert record.last_state["status"] == "SUCCEEDED", record.last_state
        foreign = [f"[mark={other}]" for other in marks if other != mark]
        texts = [json.dumps(record.messages), *model.requests[mark]]
        assert [(name, text[:80]) for name in foreign for text in texts if name in text] == []
        assert len(model.requests[mark]) >= 2 or mark in ("kind6", "kind7")
        cost = record.last_state["cost"]
        used = model.usage[mark]
        for kind in ("prompt_tokens", "completion_tokens"):
            assert cost[kind] == used[kind] > 0
    assert [marks for _, marks in model.connections.values() if len(marks) > 1] == []


def test_metagpt_cancel_during_a_model_call(metagpt: tuple[Client, ModelServer, Process]) -> None:
    """A cancel ends a run that waits for its model; no model call starts after it."""
    client, model, _ = metagpt
    model.asked.clear()
    task_id = client.create("[mark=stop] [slow]")
    with client.socket(task_id) as websocket:
        receive_until(websocket, lambda message: "waiting_on" in message["data"])
        assert model.asked.wait(TIMEOUT)
        websocket.send('{"type": "cancel"}')
        record = watched(websocket)
    requests = len(model.requests["stop"])
    assert record.events[-1]["event_type"] == "TASK_CANCELLED"
    assert (record.last_state["status"], record.close_code) == ("CANCELLED", 1000)
    model.slow.set()
    model.slow.clear()
    assert client.post(f"/api/tasks/{task_id}/cancel").status_code == 409
    assert len(model.requests["stop"]) == requests == 1
    assert "[garbage" not in json.dumps(record.messages)
    again = client.post(f"/api/tasks/{task_id}/run?restart=true")
    assert again.status_code == 202
    assert client.post(f"/api/tasks/{task_id}/cancel").status_code == 202


def test_metagpt_token_shows_while_the_model_pauses(
    metagpt: tuple[Client, ModelServer, Process],
) -> None:
    """What the model has said is seen before it says more."""
    client, model, _ = metagpt
    with client.socket(client.create("[mark=pause] [pause]")) as websocket:
        token = receive_until(websocket, is_event("TOKEN"))
        assert token["data"]["payload"]["message"] == "first words "
        model.slow.set()
        model.slow.clear()
        websocket.send('{"type": "cancel"}')
        assert watched(websocket).last_state["status"] == "CANCELLED"


SYNC_FILE_OPERATION = """
import sys, threading, time
from pathlib import Path
import streamer
settings = streamer.Settings.from_environ(port="0", grace=sys.argv[1])
engine = streamer.load_metagpt(settings.workspace)
folder = settings.workspace.parent
add = engine.GitRepository.archive
def archive(self, *args):
    (folder / "begun").touch()
    while not (folder / "end").exists():  # a file operation: nothing can interrupt it
        time.sleep(0.02)
    return add(self, *args)
engine.GitRepository.archive = archive
import openai
openai.AsyncOpenAI.close = lambda client: threading.Event().wait()
streamer.logging.basicConfig(level="INFO")
streamer.serve(streamer.create_app(settings), settings)
"""


@pytest.mark.parametrize(("grace", "abandoned"), [(2 * TIMEOUT, False), (0.5, True)])
def test_metagpt_cancel_during_a_file_operation(
    tmp_path: Path, grace: float, abandoned: bool
) -> None:
    """A thread in a synchronous operation is waited for `grace` seconds, then abandoned.

    A model's client whose close() never returns does not hold up a run's end.
    """
    with model_server() as (_, url):
        environ = {"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": url}
        with process(
            "-c", SYNC_FILE_OPERATION, str(grace), cwd=tmp_path, environ=environ
        ) as server:
            client = server.client
            watcher = client.follow(client.create("[mark=file]"))
            wait_until((tmp_path / "begun").exists)
            client.post(f"/api/tasks/{watcher.task_id}/cancel")
            if not abandoned:
                (tmp_path / "end").touch()
            watcher.join()
            assert watcher.last_state["status"] == "CANCELLED"
            assert ("was abandoned" in watcher.events[-1]["payload"]["message"]) is abandoned
            assert client.get("/healthz")["abandoned"] == abandoned
            if not abandoned:
                record = client.watch(client.create("[mark=close]", options={"implement": False}))
                assert record.last_state["status"] == "SUCCEEDED"
                message = "a model's client could not be closed: it took more than 2 s"
                assert record.of("LOG")[-1]["payload"] == {"message": message, "level": "WARNING"}


def test_metagpt_loads_while_the_server_answers(tmp_path: Path) -> None:
    """A task posted at once is PENDING and says that MetaGPT loads; the server answers."""
    with model_server() as (_, url):
        environ = {"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": url}
        with process(SERVER, "--port", "0", cwd=tmp_path, environ=environ) as server:
            client = server.client
            assert client.get("/healthz")["engine"] == "loading"
            record = client.watch(client.create(options={"implement": False}))
    waiting = [state for state in record.states if state["last_message"] == "loading MetaGPT"]
    assert {state["status"] for state in waiting} == {"PENDING"}  # one, and one a heartbeat
    assert record.last_state["status"] == "SUCCEEDED"


def test_metagpt_takes_its_own_configuration_file(tmp_path: Path) -> None:
    """~/.metagpt/config2.yaml is enough, and nothing is written to it or beside it."""
    with model_server() as (model, url):
        folder = tmp_path / ".metagpt"
        folder.mkdir()
        text = "llm:\n  api_type: openai\n  model: from-the-file\n"
        text += f"  base_url: {url}\n  api_key: {KEY}\n"
        (folder / "config2.yaml").write_text(text)
        with process(SERVER, "--port", "0", cwd=tmp_path) as server:
            client = server.client
            record = client.watch(client.create("[mark=file] [404]"))
        assert "has no model 'from-the-file'" in record.last_state["error_message"]
        assert len(model.requests["file"]) == 1
        assert [path.name for path in folder.iterdir()] == ["config2.yaml"]
        assert (folder / "config2.yaml").read_text() == text


@pytest.mark.main_path
def test_metagpt_loads_what_is_used(tmp_path: Path) -> None:
    """A vendor's SDK and what else the company does not use is imported for whoever asks for it."""
    code = """
import sys
from pathlib import Path
import streamer
engine = streamer.load_metagpt(Path.cwd())
unused = {"anthropic", "docx", "pandas", "nbclient"}
unused |= {"metagpt.environment.werewolf", "metagpt.provider.ollama_api"}
assert not unused & set(sys.modules), unused & set(sys.modules)
import pydantic
kinds = list(streamer._subclasses(pydantic.BaseModel))
kinds = [kind for kind in kinds if kind.__module__[:7] == "metagpt"]
assert [kind for kind in kinds if not kind.__pydantic_complete__] == []

from metagpt.configs.llm_config import LLMType
providers = engine.LLM_REGISTRY.providers
assert providers[LLMType.CLAUDE].__module__ == "metagpt.provider.anthropic_api"
assert providers[LLMType("ollama.embed")].__name__ == "OllamaEmbed"
counter = sys.modules["metagpt.utils.token_counter"]
assert counter.anthropic.Client is sys.modules["anthropic"].Client
try:
    providers[LLMType.GEMINI]
except ModuleNotFoundError as error:
    assert error.name.partition(".")[0] == "google"

import metagpt.actions
from metagpt.actions import Action, UserRequirement, WritePRD
from metagpt.environment import Environment
from metagpt.provider import AnthropicLLM
from metagpt.schema import Message
from metagpt.team import Team
assert WritePRD is engine.roles.product_manager.WritePRD
assert not hasattr(metagpt.actions, "no_such_name")
try:
    from metagpt.actions import ActionType  # a list of all actions, with what they need
except ModuleNotFoundError as error:
    assert error.name == "bs4"
"""
    with process("-c", code, cwd=tmp_path, environ={"OPENAI_API_KEY": KEY}) as script:
        assert script.wait() == 0, "".join(script.errors)


def test_deferred_module_is_loaded_once_for_all_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever uses it first, in whatever thread, gets the real module, and so do all others."""
    (tmp_path / "late_module.py").write_text(
        "import threading\nTHREADS = threading.active_count()\nKEY = object()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    deferred = streamer._DeferredModule("late_module")
    monkeypatch.setitem(sys.modules, "late_module", deferred)
    barrier = threading.Barrier(16)

    def use(_: int) -> object:
        barrier.wait(TIMEOUT)
        return deferred.KEY

    with ThreadPoolExecutor(16) as pool:
        assert len(set(pool.map(use, range(16)))) == 1
    assert sys.modules["late_module"].KEY is deferred.KEY


# -----------------------------------------------------------------------------
# Supervisor
# -----------------------------------------------------------------------------


def test_run_goes_on_without_watchers(tmp_path: Path) -> None:
    """A client that leaves does not end the run, and finds everything when it comes back."""
    gate = Gate()
    with live(gate, tmp_path) as client:
        task_id = client.create()
        with client.socket(task_id) as websocket:
            receive_until(websocket, is_event("MESSAGE"))
        gate.go.set()
        record = client.watch(task_id, "after=2")
        assert [event["payload"]["message"] for event in record.of("MESSAGE")] == ["after"]
        assert record.last_state["final_result"] == {"answer": 42}
        again = client.watch(task_id)
        assert again.ids == [1, 2, 3, 4, 5]
        assert again.close_code == 1000
        assert gate.runs == 1


def test_run_twice_starts_once(tmp_path: Path) -> None:
    """Starting a running task does nothing; an ended one is 409, and only restart runs a CANCELLED
    one again.
    """
    gate = Gate()
    with live(gate, tmp_path) as client:
        task_id = client.create()
        assert [client.post(f"/api/tasks/{task_id}/run").status_code for _ in range(3)] == [
            202,
            202,
            202,
        ]
        assert gate.started.wait(TIMEOUT)
        assert client.post(f"/api/tasks/{task_id}/cancel").status_code == 202
        first = client.watch(task_id)
        assert client.post(f"/api/tasks/{task_id}/run").status_code == 409
        gate.go.set()
        assert client.post(f"/api/tasks/{task_id}/run?restart=true").status_code == 202
        second = client.watch(task_id)
        assert client.post(f"/api/tasks/{task_id}/run?restart=true").status_code == 409
    assert first.ids == [1, 2, 3]
    assert second.ids == [1, 2, 3, 4, 5, 6, 7, 8]
    ends = [event["event_type"] for event in second.of(*TERMINAL)]
    assert ends == ["TASK_CANCELLED", "TASK_COMPLETE"]
    assert (gate.runs, second.last_state["status"], second.last_state["progress"]) == (
        2,
        "SUCCEEDED",
        1.0,
    )


def test_cancel_before_the_start_and_while_waiting_for_a_slot(tmp_path: Path) -> None:
    """Neither task's runner is ever called; both end CANCELLED, and the slot stays where it is."""
    gate = Gate()
    with live(gate, tmp_path, max_running=1) as client:
        running = client.create()
        waiting = client.create()
        unstarted = client.create()
        client.post(f"/api/tasks/{running}/run")
        assert gate.started.wait(TIMEOUT)
        with client.socket(waiting) as websocket:
            receive_until(websocket, lambda message: "waiting for a free slot" in str(message))
            for task_id in (waiting, unstarted):
                assert client.post(f"/api/tasks/{task_id}/cancel").status_code == 202
            record = watched(websocket)
        assert [event["event_type"] for event in record.events] == ["TASK_CANCELLED"]
        assert [event["event_type"] for event in client.watch(unstarted).events] == [
            "TASK_CANCELLED"
        ]
        gate.go.set()
        assert client.watch(running).last_state["status"] == "SUCCEEDED"
        assert gate.runs == 1
        assert client.get("/api/tasks?status=CANCELLED")["total"] == 2


@pytest.mark.anyio
async def test_cancel_races_success(tmp_path: Path) -> None:
    """200 times: an acknowledged cancel is never overwritten by a success, a refused one never
    hides it.
    """
    settings = Settings(workspace=tmp_path, test_mode=True)
    supervisor = streamer.Supervisor(settings, streamer.MemoryStore(settings), lambda run: {})
    ends = Counter[str]()
    async with supervisor.open():
        for turns in range(200):
            created, _ = await supervisor.submit("p", "t", streamer.parse_options({}, 60))
            async with supervisor.watch(created.id) as subscription:
                await supervisor.start(created.id)
                for _ in range(turns // 4):
                    await anyio.lowlevel.checkpoint()
                try:
                    await supervisor.cancel(created.id)
                    expected = "TASK_CANCELLED"
                except streamer.TaskEnded:
                    expected = "TASK_COMPLETE"
                kinds = [event.type async for delivery in subscription for event in delivery.events]
            assert [kind for kind in kinds if kind in TERMINAL] == [expected]
            ends[expected] += 1
    assert set(ends) == {"TASK_CANCELLED", "TASK_COMPLETE"}


@pytest.mark.parametrize(
    ("timeout", "end"), [(None, "cancelled by a client"), (0.2, "timed out after 0.2 s")]
)
def test_abandoned_thread_is_reported_and_unheard(
    tmp_path: Path, timeout: float | None, end: str
) -> None:
    """A runner deaf to its cancel or timeout is abandoned after `grace`; what it emits later goes
    nowhere.
    """
    release = threading.Event()
    ended = threading.Event()

    def deaf(run: Run) -> None:
        run.emit("LOG", {"message": "heard"})
        release.wait(TIMEOUT)
        run.emit("LOG", {"message": "unheard"})
        ended.set()

    with live(deaf, tmp_path, grace=0.2) as client:
        task_id = client.create(options={"timeout": timeout})
        with client.socket(task_id) as websocket:
            receive_until(websocket, is_event("LOG"))
            if timeout is None:
                websocket.send('{"type": "cancel"}')
            record = watched(websocket)
        release.set()
        assert ended.wait(TIMEOUT)
        message = record.events[-1]["payload"]["message"]
        assert message.startswith(end)
        assert "did not stop within 0.2 s and was abandoned" in message
        assert client.watch(task_id).ids == [1, 2, 3]


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        (RuntimeError("boom"), "RuntimeError: boom"),
        (SystemExit(3), "SystemExit: 3"),
        (streamer.RunFailed("no flour left"), "no flour left"),
        (["a list"], "the runner must return a mapping or None, not list"),
        (ValueError("a lone \ud800 surrogate"), "ValueError: a lone ? surrogate"),
    ],
)
def test_runner_that_fails_is_failed_with_its_reason(
    tmp_path: Path, result: Any, reason: str
) -> None:
    """Whatever a runner raises or returns, the server goes on and the task says what happened."""

    def runner(run: Run) -> Any:
        if isinstance(result, BaseException):
            raise result
        return result

    with live(runner, tmp_path) as client:
        record = client.watch(client.create())
        assert record.last_state["status"] == "FAILED"
        assert record.last_state["error_message"] == reason
        assert record.events[-1]["event_type"] == "TASK_ERROR"
        assert client.get("/healthz")["status"] == "ok"


def test_runner_cannot_emit_the_servers_events(tmp_path: Path) -> None:
    """A terminal or unknown event type is a ValueError in the runner, and so the run's failure."""

    def runner(run: Run) -> None:
        with pytest.raises(ValueError, match="event_type must be one of"):
            run.emit("TASK_COMPLETE")
        run.emit("TASK_EXPLODED")

    with live(runner, tmp_path) as client:
        record = client.watch(client.create())
    assert [event["event_type"] for event in record.events] == ["TASK_START", "TASK_ERROR"]
    assert "not 'TASK_EXPLODED'" in record.last_state["error_message"]


def test_secrets_reach_no_event(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key in the environment is blotted out of payloads, results and errors."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)

    def runner(run: Run) -> None:
        run.emit("LOG", {"message": f"the key is {KEY}", "deep": [{"key": KEY}]})
        raise RuntimeError(f"bad key {KEY}")

    with live(runner, tmp_path) as client:
        record = client.watch(client.create())
    assert KEY not in json.dumps(record.messages)
    assert record.last_state["error_message"] == "RuntimeError: bad key ***"


def leaves(value: Any) -> Iterator[str]:
    """All texts and numbers in a JSON value, keys included."""
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, list):
        for item in value:
            yield from leaves(item)
    else:
        yield str(value)


@pytest.mark.parametrize("secret", ["12345678", "nopassword", 'pass"word\\99', "passwörter"])
def test_secrets_of_any_shape_are_found_in_any_place(secret: str) -> None:
    """Digits in a number, characters that JSON escapes, a text cut in the middle: the JSON stays
    JSON, without it.
    """
    secrets = streamer.known_secrets({"DB_PASSWORD": secret})
    payload = {
        "message": f"{'x' * 290}{secret}",
        secret: [12345678, f"a\n{secret}", "a\nopassword"],
        "n": 1,
    }
    for limit in (65536, 300):
        text = streamer.encode_payload(payload, limit, secrets)
        assert [
            leaf for leaf in leaves(json.loads(text)) if secret in leaf or f"x{secret[:5]}" in leaf
        ] == []


# By name, beside those that streamer itself knows; each is 8 characters or more.
SECRETS = {
    "OPENAI_API_KEY_2": "second-openai-1",
    "PGPASSWORD": "pg-secret-1",
    "MYSQL_PWD": "my-secret-1",
    "AWS_ACCESS_KEY_ID": "AKIA-SECRET-1",
    "GOOGLE_CREDENTIALS": "google-secret-1",
    "ADMIN_PASSWD": "admin-secret-1",
    "DATABASE_URL": "postgres://app:db-secret-1@db/app",
}


@pytest.mark.parametrize("name", SECRETS)
def test_secrets_are_known_by_any_part_of_a_name(name: str) -> None:
    """As a first, a second and a last part, and glued to others."""
    assert streamer.redact(
        f"it is {SECRETS[name]}!", streamer.known_secrets({name: SECRETS[name]})
    ) != (f"it is {SECRETS[name]}!")


def test_secrets_in_urls_are_the_passwords() -> None:
    """Raw and decoded; a short one only where it stands in its URL."""
    secrets = streamer.known_secrets(
        {"A": "redis://:p%40ssw%3Ard@a/0", "B": "http://me:ab@proxy:3128, http://c"}
    )
    assert set(secrets) == {"p%40ssw%3Ard", "p@ssw:rd", ":p%40ssw%3Ard@", ":ab@"}
    assert (
        streamer.redact("http://me:ab@proxy: abc p@ssw:rd", secrets) == "http://me***proxy: abc ***"
    )


@pytest.mark.parametrize(
    "key",
    [
        "lm-studio",
        "not-needed",
        "ollama",
        "none",
        "EMPTY",
        "dummy",
        "sk-no-key-required",
        "YOUR_API_KEY",
    ],
)
def test_secrets_are_not_the_words_that_stand_for_no_key(key: str) -> None:
    """They are words of prompts; and so is the folder that PWD names no password."""
    assert (
        streamer.known_secrets(
            {"OPENAI_API_KEY": key, "PWD": "/home/me/folder", "OLDPWD": "/home/me/other"}
        )
        == []
    )


class Odd(dict[str, Any]):
    def items(self) -> Any:
        raise KeyboardInterrupt


class Unsayable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no")


def bush(depth: int = 5) -> dict[str, Any]:
    top: dict[str, Any] = {"message": "m"}

    def grow(parent: dict[str, Any], left: int) -> None:
        parent["children"] = [{"parent": parent, "top": top} for _ in range(4 if left else 0)]
        for child in parent["children"]:
            grow(child, left - 1)

    grow(top, depth)
    return top


@pytest.mark.parametrize(
    "odd", [Odd(a=1), {10**5000: 1}, {"x": math.nan}, {"m": Unprintable()}, bush(), Unsayable()]
)
def test_odd_results_and_errors_end_the_task_and_not_the_service(tmp_path: Path, odd: Any) -> None:
    """What a runner returns or raises is handled on the server's own loop, and must not stop it."""

    def runner(run: Run) -> Any:
        if isinstance(odd, Exception):
            raise odd
        return odd

    with live(runner, tmp_path) as client:
        first, second = client.watch(client.create()), client.watch(client.create())
    status = "FAILED" if isinstance(odd, Exception) else "SUCCEEDED"
    assert [first.last_state["status"], second.last_state["status"]] == [status, status]


def test_restart_goes_on_from_what_was_spent(tmp_path: Path, stored: dict[str, Any]) -> None:
    """The state's cost is the task's, whichever run it was; null once a part is unknown; /metrics
    counts it once.
    """
    prices = iter([0.5, 0.25, None, 1.0])

    def runner(run: Run) -> None:
        cost = {
            "prompt_tokens": 10,
            "completion_tokens": 5,
            "total_cost": next(prices),
            "max_budget": 3.0,
        }
        run.update(cost={**cost, "completion_tokens": 1})
        run.update(cost=cost)
        raise RuntimeError(
            f"spent {run.cost['total_cost']} of which {run.earlier_cost['total_cost']} before"
        )

    with live(runner, tmp_path, **stored) as client:
        task_id = client.create()
        seen = [client.watch(task_id).last_state]
        for _ in range(3):
            assert client.post(f"/api/tasks/{task_id}/run?restart=true").status_code == 202
            seen.append(client.watch(task_id).last_state)
        assert [state["cost"]["total_cost"] for state in seen] == [0.5, 0.75, None, None]
        assert [state["cost"]["prompt_tokens"] for state in seen] == [10, 20, 30, 40]
        assert [state["cost"]["completion_tokens"] for state in seen] == [5, 10, 15, 20]
        assert [state["cost"]["max_budget"] for state in seen] == [3.0] * 4
        assert seen[1]["error_message"] == "RuntimeError: spent 0.75 of which 0.5 before"
        text = client.http.get("/metrics").text
        values = dict(re.findall(r"^(streamer_model_\w+) ([\d.]+)$", text, re.MULTILINE))
        assert values == {
            "streamer_model_prompt_tokens_total": "40",
            "streamer_model_completion_tokens_total": "20",
            "streamer_model_cost_dollars_total": "1.75",
        }


def test_delete_races_restart(tmp_path: Path) -> None:
    """A restart that comes while the task is deleted finds it gone; the service goes on."""
    gate = Gate()
    with live(gate, tmp_path, max_running=50) as client:
        for _ in range(5):
            task_id = client.create()
            client.post(f"/api/tasks/{task_id}/run")

            def restart(_: int, task_id: str = task_id) -> int:
                return client.post(f"/api/tasks/{task_id}/run?restart=true").status_code

            with ThreadPoolExecutor(17) as pool:
                codes = pool.map(restart, range(64))
                deleted = pool.submit(client.http.delete, f"/api/tasks/{task_id}")
                assert set(codes) <= {202, 404}
                assert deleted.result().status_code == 204
            assert client.http.get(f"/api/tasks/{task_id}").status_code == 404
        gate.go.set()
        assert client.watch(client.create()).last_state["status"] == "SUCCEEDED"


def test_cancel_callback_that_fails_is_the_runners_own_problem(tmp_path: Path) -> None:
    """A cancel is acknowledged, and the run abandoned if need be, whatever the runner's callback
    does.
    """

    def runner(run: Run) -> None:
        run.on_cancel(lambda: 1 / 0)
        run.emit("LOG")
        run.wait(TIMEOUT)

    with live(runner, tmp_path) as client, client.socket(task_id := client.create()) as websocket:
        receive_until(websocket, is_event("LOG"))
        assert client.post(f"/api/tasks/{task_id}/cancel").status_code == 202
        assert watched(websocket).last_state["status"] == "CANCELLED"


@pytest.mark.anyio
async def test_deleted_task_ends_a_client_amid_its_replay() -> None:
    """A client that lags when its log goes is told so, at once."""
    broker = await new_broker(subscriber_buffer=1)
    for number in range(3000):
        await broker.publish([make_draft(number)])
    subscription = broker.subscribe()
    deliveries: Any = aiter(subscription)
    await anext(deliveries)
    await anext(deliveries)
    await broker.store.forget("t")
    broker.close(streamer.TaskNotFound("deleted"))
    with pytest.raises(streamer.TaskNotFound):
        await anext(deliveries)
    await deliveries.aclose()
    subscription.close()


def test_delete_stops_forgets_and_tells(tmp_path: Path) -> None:
    """A deleted task is cancelled, its files go, its clients get 4404."""
    gate = Gate()
    with live(gate, tmp_path) as client:
        task_id = client.create()
        (tmp_path / task_id).mkdir()
        with client.socket(task_id, "start=false") as idle:
            receive_until(idle, lambda message: message["type"] == "state")
            assert client.http.delete(f"/api/tasks/{task_id}").status_code == 204
            gone = watched(idle)
        assert gone.messages[-1]["data"]["code"] == "task_not_found"
        assert gone.close_code == 4404
        assert client.http.get(f"/api/tasks/{task_id}").status_code == 404
        assert list(tmp_path.iterdir()) == []
        running = client.create()
        client.post(f"/api/tasks/{running}/run")
        assert gate.started.wait(TIMEOUT)
        assert client.http.delete(f"/api/tasks/{running}").status_code == 204
        assert client.get("/api/tasks")["total"] == 0


class FullDisk(streamer.MemoryStore):
    """Has no room to forget a task while that has files; cannot sweep."""

    async def forget(self, task_id: str) -> None:
        if (self._settings.workspace / task_id).exists():
            raise streamer.StoreUnavailable("the disk is full")
        await super().forget(task_id)

    async def sweep(self) -> streamer.Sweep:
        self.sweeps = getattr(self, "sweeps", 0) + 1
        raise streamer.StoreUnavailable("the disk is full")


def test_delete_makes_room_for_itself(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The files of a deleted task go first; what keeps sweeps from their work is logged once."""
    settings = Settings(workspace=tmp_path, lease=1)
    store = FullDisk(settings)
    app = create_app(settings, runner=burst(1), store=store)
    with serving(streamer.Server(app, settings), loopback()) as url:
        client = Client(url)
        with client.http:
            task_id = client.create()
            (tmp_path / task_id).mkdir()
            assert client.http.delete(f"/api/tasks/{task_id}").status_code == 204
            wait_until(lambda: store.sweeps >= 2)
    assert caplog.messages.count("sweep error='the disk is full'") == 1


class CountingStore(streamer.MemoryStore):
    """Writes down what is asked of it."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.asked: list[str] = []

    async def load(self, task_id: str) -> streamer.Record:
        self.asked.append("load")
        return await super().load(task_id)

    async def claim(self, *args: Any) -> streamer.Claim | None:
        before = [*self.asked, "claim"]
        claim = await super().claim(*args)
        self.asked = before  # without its own way to do it
        return claim


def test_connecting_to_a_pending_task_costs_one_load_and_a_claim(tmp_path: Path) -> None:
    settings = Settings(workspace=tmp_path, test_mode=True)
    store = CountingStore(settings)
    app = create_app(settings, runner=burst(1), store=store)
    with serving(streamer.Server(app, settings), loopback()) as url:
        client = Client(url)
        with client.http:
            task_id = client.create()
            store.asked.clear()
            assert client.watch(task_id).last_state["status"] == "SUCCEEDED"
    assert store.asked == ["load", "claim"]


def test_limits_of_tasks_and_clients(tmp_path: Path) -> None:
    """More than max_waiting: 429 with Retry-After, and 1013 on a socket; more than max_sockets: 503
    and 1013.
    """
    gate = Gate()
    with live(gate, tmp_path, max_running=1, max_waiting=1, max_sockets=2) as client:
        tasks = [client.create() for _ in range(3)]
        codes = [client.post(f"/api/tasks/{task_id}/run") for task_id in tasks]
        assert [response.status_code for response in codes] == [202, 202, 429]
        assert codes[2].headers["retry-after"] == "5"
        assert codes[2].json()["error"]["code"] == "too_many_tasks"
        refused = client.watch(tasks[2])
        assert [message["type"] for message in refused.messages] == ["connected", "state", "error"]
        assert refused.close_code == 1013
        with (
            client.socket(tasks[0], "types=ERROR") as one,
            client.socket(tasks[1], "types=ERROR") as two,
        ):
            for websocket in (one, two):
                receive_until(websocket, lambda message: message["type"] == "state")
            third = client.watch(tasks[2])
            assert (third.messages[0]["data"]["code"], third.close_code) == (
                "too_many_clients",
                1013,
            )
            stream = client.http.get(
                f"/api/tasks/{tasks[2]}/events", headers={"Accept": "text/event-stream"}
            )
            assert (stream.status_code, stream.headers["retry-after"]) == (503, "5")
        gate.go.set()


def at_once(count: int, call: Callable[[int], Any]) -> Counter[Any]:
    """What so many calls, made at the same time, return."""
    barrier = threading.Barrier(count)

    def wait_and_call(number: int) -> Any:
        barrier.wait(TIMEOUT)
        return call(number)

    with ThreadPoolExecutor(count) as pool:
        return Counter(pool.map(wait_and_call, range(count)))


def test_limits_hold_in_a_burst(tmp_path: Path, stored: dict[str, Any]) -> None:
    """Of 40 that come at once as many get in as the limits say: runs, restarts, and clients."""
    gate = Gate()
    limits: dict[str, Any] = {"max_running": 1, "max_waiting": 2, "max_sockets": 5, "lease": 60.0}

    def start(number: int) -> int:
        return client.post(f"/api/tasks/{tasks[number]}/run?restart=true").status_code

    def watch(number: int) -> int:
        if number % 2:
            stream = raw_request(client, event_stream(tasks[number]))
            opened.enter_context(stream)
            return int(stream.recv(12)[-3:])
        socket = opened.enter_context(client.socket(tasks[number], "start=false"))
        first = json.loads(socket.recv(timeout=TIMEOUT))
        return 200 if first["type"] == "connected" else 503

    settings = {**stored, **limits, "max_tasks": 40}
    with live(gate, tmp_path, **settings) as client, contextlib.ExitStack() as opened:
        assert at_once(50, lambda number: len(client.create())) == {32: 50}
        listed = client.get("/api/tasks?page_size=100")
        assert listed["total"] == 40
        tasks = [task["id"] for task in listed["items"]]
        assert at_once(40, start) == {202: 3, 429: 37}
        assert at_once(40, watch) == {200: 5, 503: 35}
        gate.go.set()
        wait_until(lambda: client.get("/healthz")["tasks"].get("SUCCEEDED") == 3)
        gate.go.clear()
        for task_id in tasks:
            client.post(f"/api/tasks/{task_id}/cancel")
        cancelled = client.get("/healthz")["tasks"]
        assert cancelled == {"SUCCEEDED": 3, "CANCELLED": 37}
        assert at_once(40, start) == {202: 3, 429: 34, 409: 3}
        left = client.get("/healthz")["tasks"]
        assert left["CANCELLED"] == 34
        gate.go.set()


# Faults that others were reported to have; ours must not have their kind


def test_fault_events_before_the_first_watcher_are_lost(tmp_path: Path) -> None:
    """OpenHands/software-agent-sdk#1785. A run that ended before anybody looked is all there."""
    ended = threading.Event()

    def runner(run: Run) -> None:
        burst(100)(run)
        ended.set()

    with live(runner, tmp_path) as client:
        task_id = client.create()
        client.post(f"/api/tasks/{task_id}/run")
        assert ended.wait(TIMEOUT)
        assert client.watch(task_id).ids == list(range(1, 104))


def test_late_client_of_a_long_run_begins_at_the_oldest_event_kept(tmp_path: Path) -> None:
    """With more events than max_events, a replay from the start is not recovered, and has no hole
    all the same.
    """
    gate = threading.Event()

    def runner(run: Run) -> None:
        burst(5000)(run)
        gate.wait(TIMEOUT)

    with live(runner, tmp_path, max_events=1000) as client:
        task_id = client.create()
        with client.socket(task_id, "types=ERROR") as first:
            receive_until(first, lambda message: message["type"] == "state")
            wait_until(lambda: client.get(f"/api/tasks/{task_id}/state")["last_event_id"] == 5001)
            record = client.follow(task_id)
            record.sees()
            gate.set()
            record.join()
        connected = record.data("connected")[0]
        assert (connected["recovered"], connected["first_event_id"]) == (False, 4002)
        assert record.ids == list(range(4002, 5004))


def test_fault_duplicates_where_replay_meets_live(tmp_path: Path) -> None:
    """coder/xum PR 2165. Fifty clients that connect amid a burst see each event once, in order."""
    joined = [threading.Event() for _ in range(50)]

    def runner(run: Run) -> None:
        for event in joined:
            burst(100)(run)  # more than a client's buffer holds
            event.wait(TIMEOUT)

    def join(number: int) -> list[int]:
        with client.socket(task_id) as websocket:
            receive_until(websocket, lambda message: message["type"] == "connected")
            joined[number].set()
            return watched(websocket).ids

    with live(runner, tmp_path, subscriber_buffer=64) as client:
        task_id = client.create()
        with ThreadPoolExecutor(50) as pool:
            assert set(map(tuple, pool.map(join, range(50)))) == {tuple(range(1, 5_004))}


def test_fault_rejoining_a_finished_run_hangs(tmp_path: Path) -> None:
    """aegra#472. Who comes when all is over gets the replay and a normal close, over and over."""
    with live(burst(3), tmp_path) as client:
        task_id = client.create()
        records = [client.watch(task_id) for _ in range(5)]
        assert {(tuple(record.ids), record.close_code) for record in records} == {
            ((1, 2, 3, 4, 5, 6), 1000)
        }
        assert client.get("/healthz")["clients"] == 0


def test_fault_two_speakers_interleave_in_one_message(tmp_path: Path) -> None:
    """agentscope-java#2500. Tokens of two roles that stream at once keep their role and call."""
    code = """
import asyncio, streamer
def runner(run):
    engine = streamer.load_metagpt(run.workspace.parent)
    async def speak(team, role):
        streamer._speaker.set(streamer._Speaker(team, role, "Chat"))
        llm = team.context.llm_with_cost_manager_from_llm_config(team.context.config.llm)
        await llm.aask(f"[mark={role}] speak")
    async def work():
        team = streamer._Team(engine, run)
        roles = ("Architect", "Engineer", "Architect")
        await asyncio.gather(*[speak(team, role) for role in roles])
    asyncio.run(work())
streamer.logging.basicConfig(level="INFO")
settings = streamer.Settings(port=0)
streamer.serve(streamer.create_app(settings, runner=runner), settings)
"""
    with model_server() as (_, url):
        environ = {"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": url}
        with process("-c", code, cwd=tmp_path, environ=environ) as server:
            record = server.client.watch(server.client.create())
    calls: dict[tuple[str, str], str] = defaultdict(str)
    for event in record.of("TOKEN"):
        calls[event["agent_role"], event["payload"]["call_id"]] += event["payload"]["message"]
    said = sorted((role, text) for (role, _), text in calls.items())
    roles = ("Architect", "Architect", "Engineer")
    assert said == [(role, f"```python\nprint('[mark={role}]')\n```") for role in roles]


@pytest.mark.anyio
async def test_fault_another_threads_put_does_not_wake_the_loop(tmp_path: Path) -> None:
    """cpython#97970. One emit on a loop that has nothing else to do is taken at once."""
    run = Run(make_task(), Settings(workspace=tmp_path))
    news = asyncio.Event()
    run.outbox.attach(partial(asyncio.get_running_loop().call_soon_threadsafe, news.set))
    await news.wait()
    assert run.outbox.take() == []
    news.clear()
    thread = threading.Timer(0.05, run.emit, ("LOG",))
    thread.start()
    with anyio.fail_after(TIMEOUT):
        await news.wait()
    assert len(run.outbox.take()) == 1
    thread.join(TIMEOUT)


def test_fault_the_loop_closes_under_a_worker(tmp_path: Path) -> None:
    """anyio PR 1245. A thread that outlives the loop can emit, is not heard, and does not fail."""
    run = Run(make_task(), Settings(workspace=tmp_path))

    async def attach() -> None:
        loop = asyncio.get_running_loop()
        run.outbox.attach(partial(loop.call_soon_threadsafe, bool))
        assert run.outbox.take() == []

    asyncio.run(attach())
    run.emit("LOG", {"message": "nobody is left"})
    run.update(progress=0.5)


def test_fault_refusal_before_accept_is_a_403(tmp_path: Path) -> None:
    """uvicorn#1181. A socket at a path that does not exist is told so, after it was accepted."""
    with live(burst(1), tmp_path) as client:
        url = client.url.replace("http", "ws", 1)
        with connect(f"{url}/ws/nonsense", open_timeout=TIMEOUT) as websocket:
            record = watched(websocket)
    assert (record.messages[0]["data"]["code"], record.close_code) == ("not_found", 4404)


def test_fault_shutdown_hangs_on_an_open_socket(tmp_path: Path) -> None:
    """fastapi#709. A client that neither reads nor answers the close keeps no server alive."""
    with process(SERVER, "--test-mode", "--port", "0", "--grace", "3", cwd=tmp_path) as server:
        task_id = server.client.create()
        with raw_websocket(server.client, task_id), server.client.socket(task_id) as websocket:
            receive_until(websocket, is_event("TOKEN"))
            server.popen.send_signal(signal.SIGTERM)
            assert watched(websocket).close_code == 1000
            assert server.wait() == -signal.SIGTERM


def test_fault_a_payload_json_cannot_carry_kills_the_stream(tmp_path: Path) -> None:
    """hermes-agent#97288, python-socketio#1438, xagent PR 256. Each odd payload is an event like
    any other.
    """
    odd: list[dict[str, Any]] = [
        {"message": "lone \ud800"},
        {"n": math.nan, "i": math.inf},
        {"state": streamer.TaskState(task_id="x"), "set": {1}, "bytes": b"\x00\xff"},
        cycle(),
        {"message": "x" * 10_000_000},
        {"message": None, "object": object()},
    ]

    def runner(run: Run) -> None:
        for payload in odd:
            run.emit("MESSAGE", payload, "Engineer\ud800")
        run.update(progress=7.0, cost={"total_cost": math.nan})

    def strict(constant: str) -> None:
        raise AssertionError(constant)

    with live(runner, tmp_path) as client:
        watcher = client.watch(client.create())
    messages = [json.loads(text, parse_constant=strict) for text in watcher.texts]
    assert watcher.close_code == 1000
    events = [message["data"] for message in messages if message["type"] == "event"]
    assert [event["event_type"] for event in events] == [
        "TASK_START",
        *["MESSAGE"] * 6,
        "RESULT",
        "TASK_COMPLETE",
    ]
    assert all(isinstance(event["payload"]["message"], str) for event in events)
    assert events[5]["payload"]["truncated"] is True
    assert messages[-1]["data"]["status"] == "SUCCEEDED"


def test_fault_finished_runs_are_kept_for_ever(tmp_path: Path) -> None:
    """deer-flow PR 5070. Beyond max_tasks the oldest go, with log and files."""

    def runner(run: Run) -> None:
        run.workspace.mkdir()

    with live(runner, tmp_path, max_tasks=3) as client:
        tasks = [client.create() for _ in range(1)]
        for _ in range(9):
            client.watch(tasks[-1])
            tasks.append(client.create())
        assert [item["id"] for item in client.get("/api/tasks")["items"]] == tasks[:-4:-1]
        assert {path.name for path in tmp_path.iterdir()} == set(tasks[-3:-1])
        assert client.http.get(f"/api/tasks/{tasks[0]}/events").status_code == 404


@pytest.mark.anyio
@pytest.mark.parametrize("seed", range(30))
async def test_broker_keeps_its_guarantees_whatever_happens(seed: int) -> None:
    """Random publishing, subscribing at any cursor, slow reading, dropping, filtering and ending,
    against a model.
    """
    print("seed", seed)  # shown when it fails
    chance = random.Random(seed)
    settings: dict[str, Any] = {
        "subscriber_buffer": chance.choice([1, 2, 7, 256]),
        "max_events": 10_000,
    }
    broker = await new_broker(**settings)
    published: list[
        int
    ] = []  # the model: a client gets every event above its cursor, in order, then the end
    checked = 0

    async def client(
        after: int, types: frozenset[EventType] | None, lives: int, ready: bool
    ) -> None:
        nonlocal checked
        subscription = broker.subscribe(after, types)
        seen = []
        states = 0
        if ready:
            sent = bytearray()

            def write(frames: bytes) -> bool:
                accepted = chance.random() < 0.7
                sent.extend(frames if accepted else b"")
                return accepted

            subscription.write_directly(write)
        try:
            async for delivery in subscription:
                if ready:
                    sent.extend(delivery.events.frames)
                seen += [event.id for event in delivery.events]
                states += delivery.state is not None
                for _ in range(chance.randrange(4)):
                    await anyio.lowlevel.checkpoint()
                lives -= 1
                if lives == 0:
                    break
        finally:
            subscription.close()
        if ready:
            seen = [int(number) for number in re.findall(rb'"event_id":(\d+)', bytes(sent))]
        start = after if after <= len(published) else 0
        wanted = list(range(start + 1, len(published) + 1))
        if types is not None:
            wanted = [number for number in wanted if number % 3 == 0]
        assert seen == (wanted if lives > 0 else wanted[: len(seen)])
        assert states > 0
        checked += 1

    clients = 0
    async with anyio.create_task_group() as group:
        for _ in range(chance.randrange(20, 200)):
            match chance.randrange(4):
                case 0:
                    after = chance.choice([0, len(published), chance.randrange(len(published) + 1)])
                    types = chance.choice([None, frozenset({EventType.MESSAGE})])
                    lives = chance.choice([3, 10**9, 10**9])
                    group.start_soon(
                        client, after, types, lives, types is None and chance.random() < 0.5
                    )
                    clients += 1
                case 1:
                    await anyio.lowlevel.checkpoint()
                case _:
                    batch = range(len(published), len(published) + chance.randrange(1, 12))
                    kinds = [
                        EventType.MESSAGE if (number + 1) % 3 == 0 else EventType.LOG
                        for number in batch
                    ]
                    published.extend(batch)
                    await broker.publish(
                        [make_draft(n, kind) for n, kind in zip(batch, kinds, strict=True)]
                    )
        await end_task(broker)
    assert checked == clients
    assert broker.subscriptions == set()


# Keepalive and hostile clients


def raw_socket(client: Client, receive_buffer: int = 4096) -> socket.socket:
    """A connection that takes little before it is read."""
    raw = socket.socket()
    raw.settimeout(TIMEOUT)
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    raw.connect(client.address)
    return raw


def raw_websocket(client: Client, task_id: str, receive_buffer: int = 4096) -> socket.socket:
    """A WebSocket that was opened and is never read: no pong, no close, no FIN comes from it."""
    raw = raw_socket(client, receive_buffer)
    head = f"GET /ws/tasks/{task_id}?start=false HTTP/1.1\r\nHost: localhost\r\n"
    head += "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    raw.sendall(f"{head}Sec-WebSocket-Key: {'A' * 22}==\r\n\r\n".encode())
    answer = b""
    while not answer.endswith(b"\r\n\r\n"):
        byte = raw.recv(1)  # what comes behind the head stays unread
        assert byte, answer
        answer += byte
    return raw


def masked(opcode: int, payload: bytes, final: bool = True) -> bytes:
    size = len(payload)
    length = bytes((0x80 | size,)) if size < 126 else b"\xff" + size.to_bytes(8, "big")
    return bytes((opcode | 0x80 * final,)) + length + b"\0\0\0\0" + payload


@contextlib.contextmanager
def live_with(runner: Any, workspace: Path, **config: Any) -> Iterator[Client]:
    """The service with something of uvicorn's configuration changed."""
    settings = Settings(workspace=workspace, test_mode=True, grace=5.0)
    server = streamer.Server(create_app(settings, runner=runner), settings)
    for name, value in config.items():
        setattr(server.config, name, value)
    with serving(server, loopback()) as url:
        client = Client(url)
        with client.http:
            yield client


def test_client_that_vanished_is_dropped(tmp_path: Path) -> None:
    """No pong within two ping intervals: the connection is closed and its place is free."""
    with live_with(burst(1), tmp_path, ws_ping_interval=0.2, ws_ping_timeout=0.2) as client:
        with raw_websocket(client, client.create(), 65536) as raw:
            read_to_end(raw)
        wait_until(lambda: client.get("/healthz")["clients"] == 0)


def test_busy_runner_drops_no_client(tmp_path: Path) -> None:
    """A runner that computes for many ping intervals costs nobody the connection."""

    def compute(run: Run) -> None:
        end = time.monotonic() + 3.0
        while time.monotonic() < end:
            sum(range(1000))

    with live_with(compute, tmp_path, ws_ping_interval=0.5, ws_ping_timeout=0.5) as client:
        record = client.watch(client.create())
        assert (record.last_state["status"], record.close_code) == ("SUCCEEDED", 1000)


def test_hostile_frames_get_their_close_code(tmp_path: Path) -> None:
    """Too long 1009, not UTF-8 1007, unmasked 1002; a ping in pieces is one; no other notices."""
    gate = Gate()
    with live(gate, tmp_path) as client:
        task_id = client.create()
        with client.socket(task_id) as witness:
            receive_until(witness, is_event("MESSAGE"))
            ping = b'{"type": "ping"}'
            for sent, expected in [
                (masked(1, b"x" * 1_000_000)[:1000], b"\x03\xf1"),
                (masked(1, b"\xff\xfe"), b"\x03\xef"),
                (masked(2, b"\x00" * 1_000_000)[:1000], b"\x03\xf1"),
                (b"\x81\x02hi", b"\x03\xea"),
                (
                    masked(1, ping[:5], False) + masked(0, ping[5:9], False) + masked(0, ping[9:]),
                    b'{"type":"pong"',
                ),
            ]:
                with raw_websocket(client, task_id, 65536) as raw:
                    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                        raw.sendall(sent)
                    assert expected in read_until(raw, expected), sent[:20]
            gate.go.set()
            record = watched(witness)
        assert (record.ids, record.close_code) == ([3, 4, 5], 1000)
        assert {message["type"] for message in record.messages} == {"event", "state"}


def test_flood_of_messages_disturbs_nobody(tmp_path: Path) -> None:
    """A client that sends ten thousand messages and reads none is its own problem."""
    gate = Gate()
    with live(gate, tmp_path, send_timeout=1.0) as client:
        task_id = client.create()
        with client.socket(task_id) as witness, raw_websocket(client, task_id) as raw:
            receive_until(witness, is_event("MESSAGE"))
            raw.setblocking(False)
            with contextlib.suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
                for _ in range(10_000):
                    raw.sendall(masked(1, b"nonsense " * 10))
            witness.send('{"type": "ping"}')
            receive_until(witness, lambda message: message["type"] == "pong")
            gate.go.set()
            assert watched(witness).close_code == 1000


EMPTY_FRAMES = {
    "parts": masked(1, b"", False) + 1001 * masked(0, b"", False),
    "pings": 1001 * masked(9, b"x" * 125),
}


@contextlib.contextmanager
def sending(raw: socket.socket, data: bytes) -> Iterator[None]:
    """Sends all of it while the test reads what is answered."""
    sender = threading.Thread(target=raw.sendall, args=[data])
    sender.start()
    yield
    sender.join(TIMEOUT)
    assert not sender.is_alive()


@pytest.mark.parametrize("flood", EMPTY_FRAMES)
def test_flood_of_frames_without_a_message_is_cut_off(tmp_path: Path, flood: str) -> None:
    """More than a thousand close a socket with 1008; one that was refused already is aborted."""
    with live(burst(1), tmp_path) as client:
        task_id = client.create()
        with raw_websocket(client, task_id, 65536) as raw, sending(raw, EMPTY_FRAMES[flood]):
            assert b"\x03\xf0too many pings" in read_to_end(raw)
        with raw_websocket(client, "none", 65536) as raw, sending(raw, EMPTY_FRAMES[flood]):
            assert b"\x11\x34task 'none' not found" in read_to_end(raw)
        wait_until(lambda: client.get("/healthz")["clients"] == 0)


def test_messages_wait_unparsed_for_those_before_them(tmp_path: Path) -> None:
    """Five thousand at once are each answered, and the server holds a slice of them at a time."""
    waiting = [0]

    class Protocol(streamer.FrameProtocol):
        def handle_events(self) -> None:
            super().handle_events()
            waiting[0] = max(waiting[0], self.queue.qsize())

    ping = masked(1, b'{"type":"ping"}')
    with (
        live_with(burst(1), tmp_path, ws=Protocol) as client,
        raw_websocket(client, client.create(), 65536) as raw,
        sending(raw, 5000 * ping),
    ):
        received = bytearray()
        while received.count(b'"pong"') < 5000:
            received += raw.recv(1 << 20)
    assert 1 < waiting[0] <= streamer.FrameProtocol.SLICE // len(ping) + 2


def test_refused_socket_that_does_not_close_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is ended before a connection that says nothing for five seconds."""
    monkeypatch.setattr(streamer.AbortProtocol, "PATIENCE", 5.0)
    with (
        live(burst(1), tmp_path) as client,
        raw_request(client, b"") as idle,
        raw_websocket(client, "none", 65536) as raw,
    ):
        read_until(raw, b"\x11\x34")
        ended, _, _ = select.select([raw, idle], [], [], TIMEOUT)
        assert (ended, raw.recv(1)) == ([raw], b"")


def event_stream(task_id: str, version: str = "1.1") -> bytes:
    head = f"GET /api/tasks/{task_id}/events HTTP/{version}\r\nHost: localhost\r\n"
    return f"{head}Accept: text/event-stream\r\n\r\n".encode()


HEALTH = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_stream_ends_with_its_client_whatever_waits_behind_it(
    tmp_path: Path, loop: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Pipelined requests, few or many, hide no client that goes (uvicorn PR 2243)."""
    with live_with(Gate(), tmp_path, loop=loop) as client:
        task_id = client.create()
        for behind in (b"", HEALTH, 30 * HEALTH, HEALTH[:20]):
            with raw_request(client, event_stream(task_id) + behind) as raw:
                read_until(raw, b'"state"')
                assert client.get("/healthz")["clients"] == 1
            wait_until(lambda: client.get("/healthz")["clients"] == 0)
    assert [record.getMessage() for record in caplog.records if record.levelname != "INFO"] == []


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_pipelined_requests_wait_unparsed(tmp_path: Path, loop: str) -> None:
    """Ten thousand behind a stream are each answered when it ends; few are parsed at a time."""
    waiting = [0]

    class Protocol(streamer.AbortProtocol):
        def on_message_complete(self) -> None:
            super().on_message_complete()
            waiting[0] = max(waiting[0], len(self.pipeline))

    gate = Gate()
    request = b"GET / HTTP/1.1\r\n\r\n"
    with live_with(gate, tmp_path, http=Protocol, loop=loop) as client:
        task_id = client.create()
        client.post(f"/api/tasks/{task_id}/run")
        last = HEALTH.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
        requests = event_stream(task_id) + 10_000 * request + last
        with raw_request(client, b"") as raw, sending(raw, requests):
            read_until(raw, b'"before"')
            gate.go.set()
            answers = read_to_end(raw)
    assert answers.count(b"HTTP/1.1 421 ") == 10_000
    assert answers.count(b"HTTP/1.1 200 ") == 1
    assert 0 < waiting[0] <= streamer.AbortProtocol.SLICE // len(request) + 1


@pytest.mark.parametrize("framing", ["length", "chunks"])
def test_offer_of_http_2_is_passed_over(tmp_path: Path, framing: str) -> None:
    """A POST of Java's HttpClient, or of `curl --http2`, is one of HTTP/1.1 (uvicorn#2722)."""
    body = b'{"input_prompt": "p"}'
    head = b"POST /api/tasks HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAA\r\n"
    if framing == "length":
        head += b"Content-Length: %d\r\n\r\n" % len(body)
    else:
        head += b"Transfer-Encoding: chunked\r\n\r\n"
        body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    with live(burst(1), tmp_path) as client:
        with raw_request(client, head) as sock:
            sock.sendall(body + 3 * (head + body))
            sock.sendall(HEALTH.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
            answers = read_to_end(sock)
        statuses = re.findall(rb"HTTP/1.1 (\d+)", answers)
        assert statuses == [b"201", b"201", b"201", b"201", b"200"]
        connect = raw_answer(client, b"CONNECT / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert connect.startswith(b"HTTP/1.1 405")


def test_http_1_0_gets_no_chunks(tmp_path: Path) -> None:
    """The end of the connection is the end of the stream."""
    with live(burst(2), tmp_path) as client:
        task_id = client.create()
        client.watch(task_id)
        with raw_request(client, event_stream(task_id, "1.0")) as sock:
            head, _, body = read_to_end(sock).partition(b"\r\n\r\n")
        assert b"transfer-encoding" not in head
        text = client.http.get(
            f"/api/tasks/{task_id}/events", headers={"Accept": "text/event-stream"}
        ).text
        assert body.decode() == text
        health = raw_answer(client, b"GET /healthz HTTP/1.0\r\n\r\n")  # as HAProxy asks
        assert health.startswith(b"HTTP/1.1 200")


# Servers of other kinds


def normal(messages: list[str]) -> list[str]:
    """The messages without what differs from run to run: the task's id and the times."""
    texts = [re.sub(r'"(\w*_at|timestamp)":"[^"]+"', r'"\1":"T"', text) for text in messages]
    return [re.sub(r"\b[0-9a-f]{32}\b", "ID", text) for text in texts]


def story(run: Run) -> dict[str, Any]:
    for number in range(200):
        run.emit(
            "MESSAGE" if number % 50 == 0 else "LOG",
            {"message": f"日本 {number} " + "x" * number},
            "Engineer",
        )
    return {"answer": 42}


def test_ready_frames_are_the_same_bytes_as_text(tmp_path: Path) -> None:
    """With the extension, under plain uvicorn, in Starlette's test client: equal bytes."""
    settings = Settings(workspace=tmp_path, test_mode=True)
    store = streamer.MemoryStore(settings)

    def app() -> Starlette:
        return create_app(settings, runner=story, store=store)

    with serving(streamer.Server(app(), settings), loopback()) as url:
        ours = Client(url)
        with ours.http:
            task_id = ours.create()
            live_events = [text for text in ours.watch(task_id).texts if '"type":"event"' in text]
            replay = ours.watch(task_id).texts
    assert [text for text in replay if '"type":"event"' in text] == live_events
    plain = uvicorn.Config(
        app(), log_config=None, ws="websockets-sansio", timeout_graceful_shutdown=1
    )
    with serving(uvicorn.Server(plain), loopback()) as url:
        client = Client(url)
        with client.http:
            assert client.watch(task_id).texts == replay
            again = [
                text for text in client.watch(client.create()).texts if '"type":"event"' in text
            ]
            assert normal(again) == normal(live_events)
    with (
        TestClient(app(), "http://localhost") as inside,
        inside.websocket_connect(f"ws://localhost/ws/tasks/{task_id}") as websocket,
    ):
        assert [websocket.receive_text() for _ in replay] == replay
        assert websocket.receive()["code"] == 1000


def test_hypercorn_serves_the_same(tmp_path: Path) -> None:
    """Another ASGI server delivers the same messages."""
    needs("hypercorn")
    code = """
import re, streamer
from test_streamer import story
app = streamer.create_app(streamer.Settings(test_mode=True), runner=story)
"""
    (tmp_path / "served.py").write_text(code)
    with loopback() as free:
        bind = f"127.0.0.1:{free.getsockname()[1]}"
    with process(
        "-m", "hypercorn", "--workers", "0", "--bind", bind, "served:app", cwd=tmp_path
    ) as server:
        assert server.says("Running on")
        client = Client(f"http://{bind}")
        with client.http:
            texts = client.watch(client.create()).texts
    with live(story, tmp_path) as client:
        ours = client.watch(client.create()).texts
    kinds = [[text for text in each if '"type":"event"' in text] for each in (texts, ours)]
    assert normal(kinds[0]) == normal(kinds[1])
    assert '"status":"SUCCEEDED"' in texts[-1]


# -----------------------------------------------------------------------------
# Routes
# -----------------------------------------------------------------------------

JSON = {"Content-Type": "application/json"}
BAD_BODIES: list[tuple[bytes, int, str]] = [
    (b"", 400, "the body must be JSON"),
    (b"{", 400, "the body must be JSON"),
    (b"\xff\xfe", 400, "the body must be JSON"),
    (b"[" * 60_000, 400, "the body must be JSON"),
    (b'{"input_prompt": NaN}', 400, "the body must be JSON: NaN is none"),
    (b'{"n": ' + b"9" * 5000 + b"}", 400, "the body must be JSON"),
    (b"[]", 400, "the body must be an object, not an array"),
    (b"null", 400, "the body must be an object, not null"),
    (b"{}", 400, "input_prompt is missing"),
    (b'{"input_prompt": 7}', 400, "input_prompt must be a string, not the number 7"),
    (b'{"input_prompt": " \\n"}', 400, "input_prompt must be 1 to 100 characters"),
    (b'{"input_prompt": "' + b"x" * 101 + b'"}', 400, "it has 101"),
    (b'{"input_prompt": "' + b"x" * 100_000 + b'"}', 413, "the body must be at most"),
    (b'{"input_prompt": "\\ud800"}', 400, "input_prompt must be Unicode text"),
    (b'{"input_prompt": "x", "title": 7}', 400, "title must be a string, not the number 7"),
    (b'{"input_prompt": "x", "Title": "y"}', 400, "'Title' is unknown"),
]
BAD_OPTIONS = [
    ("[]", "options must be an object, not an array"),
    ('{"n": 1}', "options: 'n' is unknown"),
    ('{"\\ud800": 1}', "is unknown"),
    ('{"n_round": 51}', "options.n_round must be a whole number from 1 to 50"),
    ('{"n_round": true}', "not the boolean true"),
    ('{"investment": 0}', "options.investment must be"),
    ('{"token_budget": 1.5}', "must be a whole number of tokens from 1, not the number 1.5"),
    ('{"implement": 1}', "options.implement must be"),
    ('{"project_name": "../x"}', "options.project_name must be"),
    ('{"timeout": 1e99}', "options.timeout must be"),
    ('{"timeout": 9999}', "options.timeout must be at most 3600 s"),
    ('{"team": "debate"}', "options.team must be left out: the setting teams names none"),
    ('{"team": 1}', "options.team must be the name of a team, not the number 1"),
    ('{"approve": "WritePRD"}', "options.approve must be a list of actions, of WritePRD,"),
    ('{"approve": ["WriteIt"]}', "options.approve: 'WriteIt' is unknown; the actions are WritePRD"),
]
GOOD_BODY = b'{"input_prompt": "x"}'
BAD_REQUESTS: list[tuple[str, dict[str, str], bytes, int, str]] = [
    *(("", JSON, body, status, message) for body, status, message in BAD_BODIES),
    *(
        ("", JSON, f'{{"input_prompt": "x", "options": {options}}}'.encode(), 400, message)
        for options, message in BAD_OPTIONS
    ),
    ("", {}, GOOD_BODY, 415, "Content-Type must be application/json, not ''"),
    ("", {"Content-Type": "text/plain"}, GOOD_BODY, 415, "not 'text/plain'"),
    ("", {**JSON, "Idempotency-Key": "k" * 256}, GOOD_BODY, 400, "Idempotency-Key must be"),
    ("/nope/run", JSON, b"", 404, "task 'nope' not found"),
    ("/nope/cancel", JSON, b"", 404, "task 'nope' not found"),
    ("/nope/answers", JSON, b'{"question_id": "q", "answer": "a"}', 404, "task 'nope' not found"),
    ("/nope/answers", JSON, b'{"question_id": "q"}', 400, "answer is missing"),
    ("/nope/answers", JSON, b'{"question_id": 1, "answer": "a"}', 400, "question_id must be"),
    ("/nope/answers", JSON, b'{"question_id": "q", "answer": " "}', 400, "not only blanks"),
    ("/" + "x" * 500 + "/run", JSON, b"", 404, "not found"),
    ("/%00%ff%0a/run", JSON, b"", 404, "not found"),
    ("x", JSON, b"", 404, "POST '/api/tasksx': Not Found"),
    ("/nope", JSON, b"", 405, "Method Not Allowed"),
]


def test_bad_requests_name_what_is_wrong_and_create_nothing(tmp_path: Path) -> None:
    """Every malformed request gets its 4xx with a code and a message; no task comes of it."""
    with live(burst(1), tmp_path, max_prompt=100) as client:
        for path, headers, body, status, message in BAD_REQUESTS:
            response = client.http.post(f"/api/tasks{path}", headers=headers, content=body)
            error = response.json()["error"]
            assert response.status_code == status, (body[:60], error)
            assert set(error) == {"code", "message"}
            assert message in error["message"], body[:60]
        assert client.get("/api/tasks")["total"] == 0


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/api/tasks?page=0", "page must be a whole number from 1"),
        ("/api/tasks?page=x", "not 'x'"),
        ("/api/tasks?page_size=101", "page_size must be a whole number from 1 to 100"),
        ("/api/tasks?status=DONE", "status must be one of PENDING, RUNNING"),
        ("/api/tasks/ID/events?after=-1", "after must be a whole number from 0"),
        ("/api/tasks/ID/events?after=1e3", "not '1e3'"),
        ("/api/tasks/ID/events?after=\u0663", "after must be"),
        ("/api/tasks/ID/events?after=99999999999999999999", "after must be"),
        ("/api/tasks/ID/events?limit=1001", "limit must be a whole number from 1 to 1000"),
        ("/api/tasks/ID/events?types=LOG,NOISE", "types must be some of TASK_START,"),
    ],
)
def test_bad_queries_name_the_parameter(tmp_path: Path, path: str, message: str) -> None:
    """A parameter that does not parse is a 400 that says what it must be."""
    with live(burst(1), tmp_path) as client:
        response = client.http.get(path.replace("ID", client.create()))
        assert response.status_code == 400
        assert response.json()["error"]["code"] == "invalid_request"
        assert message in response.json()["error"]["message"]


def test_unknown_parameters_are_refused_on_every_route(tmp_path: Path) -> None:
    """A 400 names those there are, before anything is done; the page takes any, a token is none."""
    with live(burst(1), tmp_path) as client:
        task_id = client.create()
        for operation in streamer.OPERATIONS + streamer.PROTOCOL_OPERATIONS:
            path = operation.path.replace("{task_id}", task_id)
            response = client.http.request(operation.method, f"{path}?since_event_id=1&token=x")
            names = ", ".join(operation.query) or "none"
            wrong = f"query: 'since_event_id' is unknown; there are: {names}"
            assert (response.status_code, response.json()["error"]["message"]) == (400, wrong), path
        assert client.http.get("/?since_event_id=1").status_code == 200
        assert client.get(f"/api/tasks/{task_id}?token=x")["status"] == "PENDING"
        known = ", ".join(streamer.EVENTS)
        assert known == "after, types, limit, start"


def test_paths_that_are_none_name_those_there_are(tmp_path: Path) -> None:
    """Over HTTP and over the socket, whose task is then not said to be missing."""
    with live(burst(1), tmp_path) as client:
        for path in ("/nope", "/api/tasks/", "/ws/tasks/x"):
            error = client.http.get(path).json()["error"]
            assert error["code"] == "not_found"
            assert error["message"].startswith(
                f"GET '{path}': Not Found; the paths are /, /openapi"
            )
            assert "/ws/tasks/{task_id}" in error["message"]
            assert "{path}," in error["message"]
            assert "/{path}," not in error["message"].replace("artifacts/{path}", "")
        websocket = connect(f"{client.url.replace('http', 'ws', 1)}/ws", open_timeout=TIMEOUT)
        [refused] = watched(websocket).data("error")
        assert refused["code"] == "not_found"
        assert refused["message"].startswith("'/ws' not found; the paths are /, /openapi.json,")
        assert websocket.close_code == 4404


def test_title_is_null_where_none_was_given(tmp_path: Path) -> None:
    """What shows a title shows the prompt's first line then."""
    with live(burst(1), tmp_path) as client:
        for title, shown in ((None, "one"), ("Mine", "Mine")):
            body = {"input_prompt": "\none\ntwo", "title": title}
            task = client.http.post("/api/tasks", json=body).json()
            assert (task["title"], client.get(f"/api/tasks/{task['id']}")) == (title, task)
            record = client.watch(task["id"])
            assert record.data("connected")[0]["message"].startswith(f"watching '{shown}'")
            assert record.events[0]["payload"]["message"] == shown


def test_whole_numbers_may_be_written_as_floats(tmp_path: Path) -> None:
    """JSON knows no difference; null is how a task shows that an option was not given."""
    with live(burst(1), tmp_path) as client:
        options = {"n_round": 7.0, "investment": 2, "code_review": None, "timeout": None}
        task = client.get(f"/api/tasks/{client.create(options=options)}")
        assert json.dumps(task["options"]["n_round"]) == "7"
        assert task["options"]["code_review"] is True
        assert task["options"]["timeout"] == 3600


def test_openapi_describes_what_is_checked(tmp_path: Path) -> None:
    """The server's own limits, the options, each route's parameters and answers; by token."""
    bearer = {"Authorization": "Bearer secret-token"}
    limits: Any = {"max_prompt": 100, "task_timeout": 60.0, "token": "secret-token"}
    with live(burst(1), tmp_path, **limits) as client:
        assert client.http.get("/openapi.json").status_code == 401
        document = client.http.get("/openapi.json", headers=bearer).json()
    assert (document["openapi"], document["security"]) == ("3.1.0", [{"token": []}])
    operations = [each for path in document["paths"].values() for each in path.values()]
    assert [each for each in operations if not each.get("description")] == []
    create = document["paths"]["/api/tasks"]["post"]
    body = create["requestBody"]["content"]["application/json"]["schema"]
    assert body["required"] == ["input_prompt"]
    assert body["properties"]["input_prompt"]["maxLength"] == 100
    options = body["properties"]["options"]
    assert (list(options["properties"]), options["additionalProperties"]) == (
        [*streamer.OPTIONS],
        False,
    )
    assert options["properties"]["n_round"] == {
        "type": ["integer", "null"],
        "minimum": 1,
        "maximum": 50,
        "default": 5,
        "description": "a whole number from 1 to 50",
    }
    assert options["properties"]["timeout"]["maximum"] == 60
    assert [each["name"] for each in create["parameters"]] == ["Idempotency-Key"]
    assert list(create["responses"]) == ["default", "201", "200"]
    task = create["responses"]["201"]["content"]["application/json"]["schema"]["properties"]
    assert task["title"] == {"type": ["string", "null"]}
    events = document["paths"]["/api/tasks/{task_id}/events"]["get"]
    assert [(each["name"], each["in"]) for each in events["parameters"]] == [
        ("task_id", "path"),
        *((name, "query") for name in ("after", "types", "limit", "start")),
    ]


# Two bodies are other protocols', whose clients send more than is told of them here.
SCHEMATHESIS = """
warnings = false
[checks.positive_data_acceptance]
expected-statuses = ["2xx", 403, 404, 409, 422, 429]
[[operations]]
include-path = ["/api/chat", "/ag-ui"]
[operations.checks.positive_data_acceptance]
expected-statuses = ["2xx", 400]
"""


def test_openapi_is_what_the_service_does(tmp_path: Path) -> None:
    """schemathesis finds no request that is answered otherwise than it is described."""
    (tmp_path / "schemathesis.toml").write_text(SCHEMATHESIS)
    command = [needs("schemathesis"), "run", "--checks=all", "--max-examples=2", "--seed=1"]
    command += ["--phases=coverage,fuzzing,stateful", "--generation-database=none"]
    with live(burst(1), tmp_path / "workspace", max_waiting=1000) as client:
        command.append(f"{client.url}/openapi.json")
        found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout
    count = len(streamer.OPERATIONS + streamer.PROTOCOL_OPERATIONS) - 1  # not the description
    assert f"Tested: {count}" in found.stdout


def test_body_that_never_comes_times_out(tmp_path: Path) -> None:
    """A client that announces a body and does not send it gets 408 after send_timeout."""
    with live(burst(1), tmp_path, send_timeout=0.2) as client:
        head = b"POST /api/tasks HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        answer = raw_answer(client, head + b"Content-Length: 9\r\n\r\n{")
        assert answer.startswith(b"HTTP/1.1 408")


def test_create_is_idempotent_by_key(tmp_path: Path) -> None:
    """The same key gives the same task, another request under it is 422."""
    with live(burst(1), tmp_path) as client:
        bodies = [{"input_prompt": "a"}, {"input_prompt": "a"}, {"input_prompt": "b"}]
        answers = [
            client.http.post("/api/tasks", json=body, headers={"Idempotency-Key": "k1"})
            for body in bodies
        ]
        assert [answer.status_code for answer in answers] == [201, 200, 422]
        assert answers[0].json() == answers[1].json()
        assert answers[0].headers["location"] == f"/api/tasks/{answers[0].json()['id']}"
        assert client.get("/api/tasks")["total"] == 1


def test_list_pages_newest_first(tmp_path: Path) -> None:
    """25 tasks, ten a page."""
    with live(burst(1), tmp_path) as client:
        ids = [client.create(title=f"task {number}") for number in range(25)]
        pages = [client.get(f"/api/tasks?page={page}") for page in (1, 2, 3, 4)]
        assert [item["id"] for page in pages for item in page["items"]] == ids[::-1]
        assert [
            (page["total"], page["page"], page["page_size"], page["total_pages"]) for page in pages
        ] == [(25, page, 10, 3) for page in (1, 2, 3, 4)]
        assert client.get("/api/tasks?status=RUNNING")["total"] == 0


def test_events_are_paged(tmp_path: Path) -> None:
    """The log over HTTP: by cursor, by type, to its end."""
    with live(burst(10), tmp_path) as client:
        task_id = client.create()
        everything = client.watch(task_id).events
        first = client.get(f"/api/tasks/{task_id}/events?limit=4")
        assert (first["last_event_id"], first["has_more"]) == (4, True)
        rest = client.get(f"/api/tasks/{task_id}/events?after=4")
        assert first["events"] + rest["events"] == everything
        assert (rest["last_event_id"], rest["has_more"]) == (13, False)
        logs = client.get(f"/api/tasks/{task_id}/events?types=RESULT,TASK_COMPLETE")
        assert [event["event_type"] for event in logs["events"]] == ["RESULT", "TASK_COMPLETE"]
        assert client.get(f"/api/tasks/{task_id}/events?after=500")["events"] == []


def test_socket_speaks_the_protocol(tmp_path: Path) -> None:
    """connected, state, events; ping; anything else is an error, and the stream goes on."""
    gate = Gate()
    with live(gate, tmp_path) as client, client.socket(task_id := client.create()) as websocket:
        connected = json.loads(websocket.recv(timeout=TIMEOUT))
        assert connected == {
            "type": "connected",
            "data": {
                "task_id": task_id,
                "message": "watching 'Build a todo app'",
                "mode": "custom",
                "status": "PENDING",
                "first_event_id": 1,
                "last_event_id": 0,
                "recovered": True,
            },
        }
        state = json.loads(websocket.recv(timeout=TIMEOUT))
        assert (state["type"], state["data"]["status"], state["data"]["last_event_id"]) == (
            "state",
            "PENDING",
            0,
        )
        receive_until(websocket, is_event("MESSAGE"))
        malformed: list[str | bytes] = [
            "",
            "x",
            "[]",
            "{}",
            '{"type": "dance"}',
            "[" * 60000,
            b"\x00\x01",
        ]
        for bad in malformed:
            websocket.send(bad)
            error = receive_until(websocket, lambda message: message["type"] == "error")
            assert error["data"]["code"] == "invalid_request"
            assert 'expected {"type": "ping"}' in error["data"]["message"]
        answers = {"invalid_request": {}, "question_closed": {"question_id": "q", "answer": "a"}}
        for code, given in answers.items():
            websocket.send(json.dumps({"type": "answer", **given}))
            error = receive_until(websocket, lambda message: message["type"] == "error")
            assert error["data"]["code"] == code
        websocket.send('{"type": "ping"}')
        receive_until(websocket, lambda message: message["type"] == "pong")
        gate.go.set()
        record = watched(websocket)
        assert record.close_code == 1000
        assert record.events[-1] == {
            **record.events[-1],
            "event_type": "TASK_COMPLETE",
            "event_id": 5,
        }
        assert record.messages[-1]["data"]["status"] == "SUCCEEDED"


@pytest.mark.parametrize(
    ("task", "query", "code", "message"),
    [
        ("nope", "", 4404, "not found"),
        ("%00", "", 4404, "not found"),
        ("ID", "after=abc", 1008, "after must be a whole number"),
        ("ID", "after=-1", 1008, "after must be a whole number"),
        ("ID", "types=NOISE", 1008, "types must be some of"),
        ("ID", "start=perhaps", 1008, "start must be true or false"),
    ],
)
def test_socket_refusals_are_readable(
    tmp_path: Path, task: str, query: str, code: int, message: str
) -> None:
    """A refusal is an `error` message and a close code, never a failed handshake."""
    with live(burst(1), tmp_path) as client:
        record = client.watch(task.replace("ID", client.create()), query)
    assert [each["type"] for each in record.messages] == ["error"]
    assert message in record.messages[0]["data"]["message"]
    assert record.close_code == code


def test_socket_closes_with_a_reason(tmp_path: Path) -> None:
    """How the task ended, or as much of the error as a close frame holds."""
    with live(burst(1), tmp_path) as client:
        unknown = "query: 'since_event_id' is unknown; there are: after, types, start"
        for task_id, query, code, reason in (
            (client.create(), "", 1000, "the task has ended: SUCCEEDED"),
            (client.create(), "since_event_id=0", 1008, unknown),
            ("é" * 60, "", 4404, f"task '{'é' * 58}"),
        ):
            websocket = client.socket(quote(task_id), query)
            watched(websocket)
            assert (websocket.close_code, websocket.close_reason) == (code, reason)


def test_socket_chooses_an_offered_subprotocol(tmp_path: Path) -> None:
    """The first, as a browser ends the connection where none is chosen; also to refuse it."""
    with live(burst(1), tmp_path) as client:
        url = client.url.replace("http", "ws", 1)
        for task_id, code in ((client.create(), 1000), ("none", 4404)):
            subprotocols: Any = ["graphql-ws", "chat"]
            websocket = connect(
                f"{url}/ws/tasks/{task_id}", subprotocols=subprotocols, open_timeout=TIMEOUT
            )
            assert websocket.subprotocol == "graphql-ws"
            assert watched(websocket).close_code == code


def test_socket_can_only_watch_filter_and_resume(tmp_path: Path) -> None:
    """start=false starts nothing, types= leaves out, after= resumes or says that it cannot."""
    with live(burst(5), tmp_path, heartbeat=0.05) as client:
        task_id = client.create()
        with client.socket(task_id, "start=false") as websocket:
            states = [
                receive_until(websocket, lambda message: message["type"] == "state")
                for _ in range(3)
            ]
            assert {state["data"]["status"] for state in states} == {"PENDING"}
        assert client.watch(task_id, "types=RESULT,TASK_COMPLETE").ids == [7, 8]
        resumed = client.watch(task_id, "after=6")
        assert (resumed.ids, resumed.data("connected")[0]["recovered"]) == ([7, 8], True)
        lost = client.watch(task_id, "after=5000")
        assert (lost.ids, lost.data("connected")[0]["recovered"]) == (list(range(1, 9)), False)
        end = client.watch(task_id, "after=8")
        assert [message["type"] for message in end.messages] == ["connected", "state"]


def test_state_is_sent_in_silence_and_says_who_waits(tmp_path: Path) -> None:
    """Every `heartbeat` seconds a state comes, with how long an agent has waited for its model."""
    go = threading.Event()

    def runner(run: Run) -> None:
        run.update(progress=0.7)
        run.waits_for_model("Architect", "WriteDesign")
        run.update(progress=0.2)
        while not go.is_set():
            run.wait(0.01)

    with (
        live(runner, tmp_path, heartbeat=0.1) as client,
        client.socket(client.create()) as websocket,
    ):
        waits = [
            receive_until(websocket, lambda message: "waiting_on" in message["data"])["data"]
            for _ in range(4)
        ]
        assert {
            (wait["waiting_on"]["agent_role"], wait["waiting_on"]["action"]) for wait in waits
        } == {("Architect", "WriteDesign")}
        assert waits[-1]["waiting_on"]["seconds"] > waits[0]["waiting_on"]["seconds"]
        assert {wait["progress"] for wait in waits} == {0.7}
        go.set()
        assert "waiting_on" not in watched(websocket).last_state


def test_filtered_client_hears_a_state_though_tokens_pour(tmp_path: Path) -> None:
    """Silence is what the client hears: events left out for it do not put off the heartbeat."""
    go = threading.Event()

    def runner(run: Run) -> None:
        while not go.is_set():
            run.emit("TOKEN", {"message": "x"})
            run.wait(0.01)

    with (
        live(runner, tmp_path, heartbeat=0.2) as client,
        client.socket(client.create(), "types=RESULT") as websocket,
    ):
        for _ in range(8):
            receive_until(websocket, lambda message: message["type"] == "state")
        go.set()
        assert watched(websocket).of("RESULT")


def test_slow_client_is_closed_and_delays_nobody(tmp_path: Path) -> None:
    """A client that never reads is closed after send_timeout; run and readers are done before."""
    with live(burst(20_000), tmp_path, send_timeout=1.0, max_events=20_010) as client:
        task_id = client.create()
        with raw_websocket(client, task_id):
            record = client.watch(task_id)
            assert record.ids == list(range(1, 20_004))
            with client.socket(client.create(), "start=false") as other:
                receive_until(other, lambda message: message["type"] == "state")
                wait_until(
                    lambda: "streamer_slow_clients_total 1" in client.http.get("/metrics").text
                )


def test_sse_is_the_sockets_twin(tmp_path: Path) -> None:
    """The same messages; ids on events; resumes by Last-Event-ID; 208 when no more will come."""
    with live(burst(5), tmp_path) as client:
        task_id = client.create()
        over_socket = client.watch(task_id).messages
        path = f"/api/tasks/{task_id}/events"
        accept = {"Accept": "text/event-stream"}
        response = client.http.get(path, headers=accept)
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        blocks = [
            dict(line.split(": ", 1) for line in block.split("\n"))
            for block in response.text.split("\n\n")[:-1]
        ]
        messages = [json.loads(block["data"]) for block in blocks]
        assert [message for message in messages if message["type"] == "event"] == [
            message for message in over_socket if message["type"] == "event"
        ]
        assert [message["type"] for message in messages[:2]] == ["connected", "state"]
        assert messages[-1]["data"]["status"] == "SUCCEEDED"
        assert [int(block["id"]) for block in blocks if "id" in block] == list(range(1, 9))
        resumed = client.http.get(path, headers={**accept, "Last-Event-ID": "7"})
        assert re.findall(r"^id: (\d+)$", resumed.text, re.MULTILINE) == ["8"]
        again = client.http.get(path, headers={**accept, "Last-Event-ID": "8"})
        assert (again.status_code, again.headers["content-type"][:17]) == (208, "text/event-stream")
        assert client.http.get("/api/tasks/nope/events", headers=accept).status_code == 404


def test_sse_starts_a_task_that_was_not(tmp_path: Path) -> None:
    """With start=true, once; without it, its first message says what starts it."""
    accept = {"Accept": "text/event-stream"}
    with live(burst(1), tmp_path) as client:
        task_id = client.create()
        path = f"/api/tasks/{task_id}/events"
        how = f"not started: POST /api/tasks/{task_id}/run, or connect with start=true"
        with client.http.stream("GET", path, headers=accept) as stream:
            assert how in next(stream.iter_lines())
        with client.socket(task_id, "start=false") as websocket:
            assert how in websocket.recv(decode=True)
        client.http.head(f"{path}?start=true", headers=accept)
        client.get(f"{path}?start=true")
        assert client.get(f"/api/tasks/{task_id}")["status"] == "PENDING"
        for _ in range(2):
            text = client.http.get(f"{path}?start=true", headers=accept).text
            assert ("not started" in text, text.count("TASK_START")) == (False, 1)
            assert '"status":"SUCCEEDED"' in text
        assert "not started" not in client.watch(client.create()).texts[0]


SSE_CLIENTS = """
import { fetchEventSource } from '@microsoft/fetch-event-source';
import { EventSource } from 'eventsource';
const url = process.argv[2];
globalThis.window = globalThis;  // the first is made for pages
globalThis.document = { addEventListener() {}, removeEventListener() {} };
let seen = [];
const note = ({ data }) => seen.push(JSON.parse(data).type);
function onerror(error) { throw error; }
obey({
  fetch: headers => fetchEventSource(url, { headers, onmessage: note, onerror }),
  source: () => new Promise(resolve => {
    const source = new EventSource(url);
    source.onmessage = note;
    source.onerror = () => {
      seen.push('error');
      if (source.readyState === EventSource.CLOSED) resolve();
    };
  }),
}, () => ({ seen: seen.splice(0) }));
"""


def test_sse_clients_are_content_at_the_end(tmp_path: Path) -> None:
    """One gives up at anything but a 200, the other once it has read a stream to its end."""
    with live(burst(0), tmp_path) as client:
        task_id = client.create()
        client.watch(task_id)
        url = f"{client.url}/api/tasks/{task_id}/events"
        whole = ["connected", "state", "event", "event", "event", "state"]
        with front_end(tmp_path / "node", SSE_CLIENTS, url) as clients:
            assert clients("fetch", {})["seen"] == whole
            resumed = clients("fetch", {"last-event-id": "3"})
            assert resumed["seen"] == ["connected", "state"]
            assert clients("source")["seen"] == [*whole, "error", "error"]


COMPRESSING_PROXY = """
import compression from 'compression';
import express from 'express';
import { request } from 'node:http';
const app = express();
app.use(compression({ threshold: 0 }));
app.use(({ method, url, headers }, response) => request(process.argv[2] + url,
  { method, headers: { ...headers, host: 'localhost' } }, answer => {
    response.writeHead(answer.statusCode, answer.headers);
    answer.pipe(response);
  }).end());
const server = app.listen(0, '127.0.0.1');
await new Promise(resolve => server.once('listening', resolve));
obey({}, () => server.address());
"""


def test_sse_comes_at_once_through_a_proxy_that_compresses(tmp_path: Path) -> None:
    """express with `compression()`, which compresses another answer."""
    gate = Gate()
    with (
        live(gate, tmp_path) as client,
        front_end(tmp_path / "node", COMPRESSING_PROXY, client.url) as proxy,
        httpx2.Client(base_url=f"http://127.0.0.1:{proxy('look')['port']}") as http,
    ):
        page = http.get("/")
        assert page.headers["content-encoding"] in ("gzip", "br")
        path = f"/api/tasks/{client.create()}/events?start=true"
        with http.stream("GET", path, headers={"Accept": "text/event-stream"}) as stream:
            lines = stream.iter_lines()
            assert any('"message":"before"' in line for line in lines)
            gate.go.set()
            assert any('"status":"SUCCEEDED"' in line for line in lines)


def test_sse_of_some_types_comes_to_an_end(tmp_path: Path) -> None:
    """A state says up to where the client has all that it wants, so that 208 ends it."""
    with live(burst(5), tmp_path) as client:
        task_id = client.create()
        client.watch(task_id)
        path = f"/api/tasks/{task_id}/events?types=TASK_START,ARTIFACT"
        accept = {"Accept": "text/event-stream"}
        ids = re.findall(
            r"^id: (\d+)\ndata: {\"type\":\"(\w+)", client.http.get(path, headers=accept).text, re.M
        )
        assert ids == [("0", "state"), ("1", "event"), ("8", "state")]
        ended = client.http.get(path, headers={**accept, "Last-Event-ID": "8"})
        assert (ended.status_code, ended.text.count('"type":"event"')) == (208, 0)
        for resume, first in (("", "0"), ("1", "1")):
            text = client.http.get(path, headers={**accept, "Last-Event-ID": resume}).text
            assert re.findall(r"^id: (\d+)$", text, re.M)[0] == first


EVENT_SOURCE = """([url]) => new Promise((resolve) => {
  const source = new EventSource(url);
  const got = [];
  source.onopen = () => got.push("open");
  source.onmessage = ({data}) => {
    const {type, data: {event_type}} = JSON.parse(data);
    got.push(event_type || type);
  };
  source.onerror = () => {
    got.push("error");
    if (source.readyState === EventSource.CLOSED) resolve(got);
  };
})"""


@pytest.mark.parametrize("types", ["", "RESULT", "ARTIFACT"])
def test_browsers_event_source_stops_at_the_end(tmp_path: Path, chromium: Any, types: str) -> None:
    """It connects again once, is told that no more will come, and gives up."""
    with live(burst(0), tmp_path) as client:
        task_id = client.create()
        client.watch(task_id)
        chromium.goto(client.url)
        url = f"{client.url}/api/tasks/{task_id}/events?types={types}"
        got = chromium.evaluate(EVENT_SOURCE, [url])
    events = {"": ["TASK_START", "RESULT", "TASK_COMPLETE"], "RESULT": ["RESULT"], "ARTIFACT": []}
    ends = ["state", "error", "error"]
    assert got == ["open", "connected", "state", *events[types], *ends]


def test_sse_clients_that_leave_or_stall_are_let_go(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A dropped connection frees its place at once, one that stalls after send_timeout."""
    gate = Gate()

    def runner(run: Run) -> None:
        gate(run)
        burst(20_000)(run)

    with live(runner, tmp_path, send_timeout=0.5) as client:
        task_id = client.create()
        client.post(f"/api/tasks/{task_id}/run")
        head = f"GET /api/tasks/{task_id}/events HTTP/1.1\r\nHost: localhost\r\n"
        request = f"{head}Accept: text/event-stream\r\n\r\n".encode()
        for _ in range(20):
            assert raw_answer(client, request).startswith(b"HTTP/1.1 200")
        wait_until(lambda: client.get("/healthz")["clients"] == 0)
        with raw_socket(client) as stalled:
            stalled.sendall(request)
            assert stalled.recv(1)
            gate.go.set()
            assert client.watch(task_id).last_state["status"] == "SUCCEEDED"
            wait_until(lambda: "streamer_slow_clients_total 1" in client.http.get("/metrics").text)
            read_to_end(stalled)  # its connection is gone, not waiting for it
        headed = client.http.head(
            f"/api/tasks/{task_id}/events", headers={"Accept": "text/event-stream"}
        )
        assert headed.headers["content-type"].startswith("text/event-stream")
        head = "POST /api/tasks HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        raw_request(client, f"{head}Content-Length: 100\r\n\r\n{{".encode()).close()
        assert client.get("/healthz")["clients"] == 0
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == []


def test_artifacts_stay_inside_the_workspace(tmp_path: Path) -> None:
    """What is seen is the task's own visible files, nothing by .., links or absolute paths."""
    (tmp_path / "secret.txt").write_text("secret")

    def runner(run: Run) -> None:
        (run.workspace / "docs" / ".git").mkdir(parents=True)
        (run.workspace / "docs" / ".git" / "config").write_text("hidden")
        (run.workspace / "docs" / "page.html").write_text("<script>alert(1)</script>")
        (run.workspace / "hid\udcffden").mkdir()
        (run.workspace / "hid\udcffden" / ".name\udcff").write_text("a name that is no UTF-8")
        (run.workspace / "logo.bin").write_bytes(b"\x89PNG\xff")
        (run.workspace / "link.txt").symlink_to(tmp_path / "secret.txt")
        (run.workspace / "outside").symlink_to(tmp_path)
        run.report_files("Engineer")
        (run.workspace / "logo.bin").unlink()
        (run.workspace / "docs" / "page.html").write_text("<p>longer than before, by a bit</p>")
        run.report_files()

    with live(runner, tmp_path / "work") as client:
        task_id = client.create()
        record = client.watch(task_id)
        changes = [
            (event["payload"]["change"], event["payload"]["path"])
            for event in record.of("ARTIFACT")
        ]
        assert changes[:2] == [("created", "docs/page.html"), ("created", "logo.bin")]
        assert changes[2:] == [("modified", "docs/page.html"), ("deleted", "logo.bin")]
        base = f"/api/tasks/{task_id}/artifacts"
        assert [file["path"] for file in client.get(base)] == ["docs/page.html"]
        page = client.http.get(f"{base}/docs/page.html")
        assert page.headers["content-type"] == "text/plain; charset=utf-8"
        assert page.headers["x-content-type-options"] == "nosniff"
        bad = [
            "../secret.txt",
            "%2e%2e/secret.txt",
            "..%2f..%2fsecret.txt",
            "/etc/hostname",
            "%2fetc%2fhostname",
        ]
        bad += [
            "link.txt",
            "outside/secret.txt",
            "docs/.git/config",
            "docs",
            "",
            "%00",
            "x" * 5000,
            "no.txt",
        ]
        for path in bad:
            response = client.http.get(f"{base}/{path}")
            assert response.status_code == 404, path
            assert "secret" not in response.text.replace(path, "").replace("secret.txt", "")


def test_artifacts_of_any_name_and_time(tmp_path: Path) -> None:
    """A file is listed, fetched and zipped, or none of it; where the file system keeps any time."""
    times = {"ok.txt": 10**9, "old.txt": -(10**12), "1969.txt": -1, "2108.txt": 4354819200}
    times["late.txt"] = 10**12

    def runner(run: Run) -> None:
        for name in ("line\nbreak", "\x1b[2J", "nel\x85", "line\u2028", "no \udcff UTF-8"):
            (run.workspace / name).mkdir(parents=True)
            (run.workspace / name / "x.txt").write_text("x")
            (run.workspace / f"{name}.txt").write_text("x")
        (run.workspace / "link.txt").symlink_to("ok.txt")
        for name, seconds in times.items():
            (run.workspace / name).write_text(name)
            os.utime(run.workspace / name, (seconds, seconds))
        run.report_files()

    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None  # which keeps 64 bits of a time
    with (
        tempfile.TemporaryDirectory(dir=memory) as workspace,
        live(runner, Path(workspace)) as client,
    ):
        record = client.watch(client.create())
        base = f"/api/tasks/{record.task_id}/artifacts"
        written = sorted(times)
        assert [event["payload"]["path"] for event in record.of("ARTIFACT")] == written
        files = {file["path"]: file["modified"] for file in client.get(base)}
        assert sorted(files) == written
        assert files["1969.txt"] == "1969-12-31T23:59:59.000Z"
        for name in written:
            assert client.http.get(f"{base}/{name}").text == name
        for name in ("line%0Abreak.txt", "link.txt", "no%20%FF%20UTF-8.txt"):
            assert client.http.get(f"{base}/{name}").status_code == 404
        (tmp_path / "all.zip").write_bytes(client.http.get(f"{base}.zip").content)
        with zipfile.ZipFile(tmp_path / "all.zip") as archive:
            years = {entry.filename: entry.date_time[0] for entry in archive.infolist()}
        assert sorted(years) == written
        assert (years["1969.txt"], years["ok.txt"], years["2108.txt"]) == (1980, 2001, 2107)


@pytest.mark.parametrize(("change", "whole"), [(1, True), (-1, False), (-(16 << 20), False)])
def test_file_that_changes_while_it_is_downloaded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, change: int, whole: bool
) -> None:
    """What is sent is what was there at the start; where that is gone the client is cut off."""
    size = 16 << 20
    content = random.Random(5).randbytes(size)

    def runner(run: Run) -> None:
        run.workspace.mkdir()
        (run.workspace / "large.bin").write_bytes(content)

    with live(runner, tmp_path) as client:
        task_id = client.create()
        client.watch(task_id)
        path = f"/api/tasks/{task_id}/artifacts/large.bin"
        with raw_socket(client) as stalled:
            head = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
            stalled.sendall(head.encode())
            received = stalled.recv(65536)
            with (tmp_path / task_id / "large.bin").open("r+b") as file:
                file.truncate(size + change)
            answer, _, body = (received + read_to_end(stalled)).partition(b"\r\n\r\n")
        assert f"content-length: {size}".encode() in answer
        assert content.startswith(body)
        assert (len(body) == size) == whole
    says = f"download path='{path}' cut='the file became shorter while it was read; try again'"
    messages = [record.getMessage() for record in caplog.records if record.levelno > 20]
    assert messages == ([] if whole else [says])


def test_zip_holds_the_workspace_in_bounded_memory(tmp_path: Path) -> None:
    """Every visible file, byte for byte, no link; 16 MB pass through without staying.

    They are random, so that the zip is as large: neither is ever in memory as a whole.
    """
    large = random.Random(5).randbytes(16 << 20)

    def runner(run: Run) -> None:
        (run.workspace / ".git").mkdir(parents=True)
        (run.workspace / ".git" / "config").write_text("hidden")
        (run.workspace / "日本.txt").write_text("text")
        (run.workspace / "link.txt").symlink_to("/etc/hostname")
        (run.workspace / "large.bin").write_bytes(large)

    with live(runner, tmp_path) as client:
        task_id = client.create()
        client.watch(task_id)
        tracemalloc.start()
        with client.http.stream("GET", f"/api/tasks/{task_id}/artifacts.zip") as response:
            assert response.headers["content-type"] == "application/zip"
            assert f'filename="{task_id}.zip"' in response.headers["content-disposition"]
            with (tmp_path / "all.zip").open("wb") as file:
                for chunk in response.iter_bytes():
                    file.write(chunk)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 8 << 20
        with zipfile.ZipFile(tmp_path / "all.zip") as archive:
            assert {name: archive.read(name) for name in archive.namelist()} == {
                "large.bin": large,
                "日本.txt": b"text",
            }
        path = f"/api/tasks/{task_id}/artifacts.zip"
        part = client.http.get(path, headers={"Range": "bytes=0-3"})
        assert (part.status_code, part.content) == (206, b"PK\x03\x04")
        assert client.http.get(f"/api/tasks/{'0' * 32}/artifacts.zip").status_code == 404


def test_health_and_metrics_count(tmp_path: Path) -> None:
    """healthz says mode and load, metrics is Prometheus text that adds up."""
    with live(burst(7), tmp_path) as client:
        client.watch(client.create())
        health = client.get("/healthz")
        assert (health["status"], health["mode"], health["engine"]) == ("ok", "custom", "ready")
        assert health["tasks"] == {"SUCCEEDED": 1}
        text = client.http.get("/metrics").text
        values = dict(re.findall(r"^(\S+(?:\{.*?\})?) ([\d.]+)$", text, re.MULTILINE))
        assert values['streamer_tasks{status="SUCCEEDED"}'] == "1"
        assert (values["streamer_events_total"], values["streamer_deliveries_total"]) == (
            "10",
            "10",
        )
        assert values["streamer_store_up"] == "1"
        assert values["streamer_model_completion_tokens_total"] == "0"
        assert text.endswith("\n")
        kind = ""
        for line in text.splitlines():
            if found := re.fullmatch(r"# TYPE (streamer_\w+) (gauge|counter)", line):
                kind = found[1]
            else:
                assert re.fullmatch(rf'{kind}(\{{status="\w+"\}})? \d+(\.\d+)?', line), line


def test_log_tells_of_tasks_and_clients(
    scripted: Client, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """One key=value line a transition, and one a client with its outcome."""
    with caplog.at_level("INFO", "streamer"), live(burst(3), tmp_path) as client:
        task_id = client.create()
        client.watch(task_id)
        with client.socket(task_id, "after=4") as websocket:
            websocket.recv()
        client.http.get(f"/api/tasks/{task_id}/events", headers={"Accept": "text/event-stream"})
    said = "\n".join(record.getMessage() for record in caplog.records)
    for status in ("PENDING", "RUNNING", "SUCCEEDED"):
        assert f"task id={task_id} status={status} mode=custom" in said
    assert f"client task={task_id} after=0 events=6 outcome=served" in said
    assert f"client task={task_id} after=4 events=2 outcome=served" in said


# -----------------------------------------------------------------------------
# Protocols
# -----------------------------------------------------------------------------

# Both clients obey lines of stdin, each a JSON array: a name and what it takes. They answer each
# with a line: all that a front end would show.
OBEY = """
import { createInterface } from 'node:readline';
async function obey(actions, shown) {
  for await (const line of createInterface({ input: process.stdin })) {
    const [name, argument] = JSON.parse(line);
    await actions[name]?.(argument);
    console.log(JSON.stringify(shown()));
  }
}
"""
AI_SDK_CLIENT = """
import { Chat } from '@ai-sdk/react';
import { DefaultChatTransport } from 'ai';
const [url, id] = process.argv.slice(2);
const told = [];
const transport = new DefaultChatTransport({ api: url + '/api/chat' });
const chat = new Chat({ id, transport, onData: part => told.push(part.type), onError() {} });
obey({
  send: text => chat.sendMessage({ text }),
  begin: text => void chat.sendMessage({ text }),
  again: text => chat.sendMessage({ text, messageId: chat.messages.at(-2).id }),
  'edit first': text => chat.sendMessage({ text, messageId: chat.messages[0].id }),
  regenerate: () => chat.regenerate(),
  stop: () => chat.stop(),
  resume: () => chat.resumeStream(),
  'begin resume': () => void chat.resumeStream(),
}, () => ({ status: chat.status, messages: chat.messages, told, error: chat.error?.message }));
"""
AG_UI_CLIENT = """
const [url, threadId, name] = process.argv.slice(2);
const { HttpAgent } = await import(name);
const agent = new HttpAgent({ url: url + '/ag-ui', threadId });
let error, result, types = [];
console.error = () => {};
const watching = { onEvent: ({ event }) => void types.push(event.type) };
async function run(runId) {
  types = [];
  error = result = undefined;
  try {
    result = (await agent.runAgent({ runId }, watching)).result;
  } catch (caught) {
    error = caught.message;
  }
}
function say([runId, content]) {
  agent.addMessage({ id: 'message ' + runId, role: 'user', content });
  return run(runId);
}
obey({
  send: say,
  begin: told => void say(told),
  again: run,
  stop: () => agent.abortRun(),
}, () => ({ messages: agent.messages, state: agent.state, types, error, result }));
"""
# What CopilotKit's components do, in one process with the server of the README.
COPILOTKIT_CLIENT = """
import { CopilotKitCore, ProxiedCopilotRuntimeAgent } from '@copilotkit/core';
import './server.mjs';
const [runtimeUrl] = process.argv.slice(2);
const core = new CopilotKitCore({ runtimeUrl, properties: { options: { approve: ['WritePRD'] } } });
const told = [];
core.subscribe({ onError: ({ error }) => void told.push(error.message) });
function load() {
  const agent = new ProxiedCopilotRuntimeAgent({ runtimeUrl, agentId: 'default', threadId: 't' });
  agent.subscribe({ onCustomEvent: ({ event }) => void told.push(event.name) });
  return agent;
}
let agent = load();
obey({
  send(content) {
    agent.addMessage({ id: crypto.randomUUID(), role: 'user', content });
    return core.runAgent({ agent });
  },
  reload() {
    agent = load();
    return core.connectAgent({ agent });
  },
}, () => ({ messages: agent.messages, state: agent.state, told }));
"""


class FrontEnd:
    """An official client of a protocol in Node, which does what it is told."""

    def __init__(self, popen: subprocess.Popen[str]) -> None:
        self._popen = popen

    def __call__(self, action: str, argument: Any = None) -> dict[str, Any]:
        """What it shows when the action is done."""
        assert self._popen.stdin is not None
        assert self._popen.stdout is not None
        self._popen.stdin.write(json.dumps([action, argument]) + "\n")
        self._popen.stdin.flush()
        line = self._popen.stdout.readline()
        assert line, "the client has ended"
        shown: dict[str, Any] = json.loads(line)
        return shown

    def until(self, wanted: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
        """What it shows once that fits."""
        return wait_until(lambda: shown if wanted(shown := self("look")) else {})


@contextlib.contextmanager
def front_end(folder: Path, script: str, *arguments: str) -> Iterator[FrontEnd]:
    folder.mkdir(exist_ok=True)
    (folder / "node_modules").symlink_to(node_modules())
    (folder / "client.mjs").write_text(OBEY + script)
    pipe = subprocess.PIPE
    command = ["node", "client.mjs", *arguments]
    with subprocess.Popen(command, cwd=folder, stdin=pipe, stdout=pipe, text=True) as popen:
        try:
            yield FrontEnd(popen)
        finally:
            popen.kill()


def spoken_of(texts: Iterable[tuple[str | None, str]]) -> dict[str | None, str]:
    """All that each role said."""
    spoken: dict[str | None, str] = defaultdict(str)
    for role, text in texts:
        spoken[role] += text
    return dict(spoken)


def spoken_in_log(client: Client, task_id: str, kind: str = "TOKEN") -> dict[str | None, str]:
    events = [event for event in whole_log(client, task_id) if event["event_type"] == kind]
    return spoken_of((event["agent_role"], event["payload"]["message"]) for event in events)


def spoken_in_chat(message: dict[str, Any], kind: str = "text") -> dict[str | None, str]:
    parts = [part for part in message["parts"] if part["type"] == kind]
    return spoken_of(
        (part["providerMetadata"]["streamer"]["agent_role"], part["text"]) for part in parts
    )


def spoken_in_ag_ui(messages: list[dict[str, Any]]) -> dict[str | None, str]:
    agents = [message for message in messages if message["role"] == "assistant"]
    return spoken_of((message.get("name"), message["content"]) for message in agents)


class TwoAtOnce:
    """Two roles that speak at once, one of them thinks; it waits half-way, and ends as told."""

    def __init__(self) -> None:
        self.go = threading.Event()

    def __call__(self, run: Run) -> dict[str, Any]:
        for role in ("Alex", "Bob"):
            run.emit("AGENT_START", {"message": f"{role} starts", "action": "Speak"}, role)
        run.emit("REASONING", {"message": "hm", "action": "Speak", "call_id": "1"}, "Alex")
        for number in range(10):
            if number == 5:
                while not self.go.is_set():
                    run.wait(0.01)
            for speaker, call_id in (("Alex", "1"), ("Bob", "2"), ("Bob", "3"), (None, "4")):
                payload = {"message": f"{number} {ODD_TEXT}\n", "action": "Speak"}
                run.emit("TOKEN", {**payload, "call_id": call_id}, speaker)
        run.emit("ERROR", {"message": "Bob stumbled"}, "Bob")
        if "fail" in run.prompt:
            raise RuntimeError("nothing to build")
        run.emit("AGENT_COMPLETE", {"message": "Alex is done", "action": "Speak"}, "Alex")
        return {"answer": 42}


def test_ai_sdk_shows_a_run(tmp_path: Path) -> None:
    """Two roles at once, one answer: each role's text and thinking is the log's."""
    team = TwoAtOnce()
    team.go.set()
    with (
        live(team, tmp_path) as client,
        front_end(tmp_path / "node", AI_SDK_CLIENT, client.url, "c") as chat,
    ):
        shown = chat("send", "two")
        assert (shown["status"], shown.get("error")) == ("ready", None)
        answer = shown["messages"][1]
        task_id = answer["metadata"]["task_id"]
        assert spoken_in_chat(answer) == spoken_in_log(client, task_id)
        assert spoken_in_chat(answer, "reasoning") == {"Alex": "hm"}
        agents = [part["data"] for part in answer["parts"] if part["type"] == "data-agent"]
        assert [(agent["agent_role"], agent["status"]) for agent in agents] == [
            ("Alex", "done"),
            ("Bob", "failed"),
        ]
        assert {part.get("state", "done") for part in answer["parts"]} == {"done"}
        assert "data-state" in shown["told"]
        task = client.get(f"/api/tasks/{task_id}")
        assert (task["input_prompt"], task["status"]) == ("two", "SUCCEEDED")
        assert "origin" not in task


def test_ai_sdk_is_told_of_failure_and_cancel(tmp_path: Path) -> None:
    """A run that fails is the client's error; one that is cancelled ends, and another may follow;
    asked again, a failed message gets a run of its own."""
    team = TwoAtOnce()
    with (
        live(team, tmp_path) as client,
        front_end(tmp_path / "node", AI_SDK_CLIENT, client.url, "c") as chat,
    ):
        chat("begin", "one that is cancelled")
        task_id = chat.until(lambda shown: len(shown["messages"]) == 2)["messages"][1]["id"]
        assert client.post(f"/api/tasks/{task_id}/cancel").status_code == 202
        chat.until(lambda shown: shown["status"] == "ready")
        team.go.set()
        shown = chat("send", "fail")
        assert (shown["status"], shown["error"]) == ("error", "RuntimeError: nothing to build")
        first = client.get("/api/tasks")["total"]
        shown = chat("regenerate")
        assert (shown["status"], client.get("/api/tasks")["total"]) == ("error", first + 1)


def test_ai_sdk_resumes(tmp_path: Path) -> None:
    """A connection that was cut goes on with all of the answer, once."""
    team = TwoAtOnce()
    with (
        live(team, tmp_path) as client,
        front_end(tmp_path / "node", AI_SDK_CLIENT, client.url, "a b/c?") as chat,
    ):
        chat("begin", "two")
        chat.until(lambda shown: "4 <script>" in json.dumps(shown["messages"]))
        chat("stop")
        chat("begin resume")
        chat.until(lambda shown: shown["status"] == "streaming")
        team.go.set()
        shown = chat.until(lambda shown: shown["status"] == "ready")
        task_id = shown["messages"][1]["metadata"]["task_id"]
        assert len(shown["messages"]) == 2
        assert spoken_in_chat(shown["messages"][1]) == spoken_in_log(client, task_id)


def test_ai_sdk_conversation_outlives_the_server(tmp_path: Path) -> None:
    """With SQLite the next message finds its conversation; what ran is an error to who resumes."""
    command = ["-c", QUICK, "--test-mode", "--db", "tasks.db", "--port"]
    with process(*command, "0", cwd=tmp_path) as server:
        port = str(server.client.address[1])
        url = server.client.url
        with front_end(tmp_path / "node", AI_SDK_CLIENT, url, "c") as chat:
            assert chat("send", "first")["status"] == "ready"
            server.stop()
            with process(*command, port, cwd=tmp_path) as second:
                assert second.client.get("/api/tasks")["total"] == 1
                assert chat("resume")["status"] == "ready"  # nothing runs
                shown = chat("again", "first")  # as a client does whose answer was lost
                assert (shown["status"], second.client.get("/api/tasks")["total"]) == ("ready", 1)
                shown = chat("send", "second")
                assert (shown["status"], len(shown["messages"])) == ("ready", 4)
                assert second.client.get("/api/tasks")["total"] == 2


BAD_CHATS: list[tuple[Any, str]] = [
    ({}, "messages must be an array, not null"),
    ({"messages": []}, "messages must hold one whose role is user: its text is the prompt"),
    ({"messages": [1, {"role": "assistant"}]}, "messages must hold one whose role is user"),
    ({"messages": [{"id": "m", "role": "user"}]}, "must have a content or parts with text"),
    (
        {"messages": [{"id": "m", "role": "user", "content": 1}]},
        "must have a content or parts with text",
    ),
    (
        {"messages": [{"id": "m", "role": "user", "content": [{"type": "image"}, 1]}]},
        "1 to 32000 characters",
    ),
    ({"messages": [{"id": "m", "role": "user", "content": "\ud800"}]}, "unpaired surrogate"),
]


@pytest.mark.parametrize(("body", "reason"), BAD_CHATS)
@pytest.mark.parametrize("path", ["/api/chat", "/ag-ui"])
def test_protocols_refuse_bad_bodies(
    tmp_path: Path, path: str, body: dict[str, Any], reason: str
) -> None:
    """What is no conversation is a 400 that says what is wrong, and creates nothing."""
    ids = {"id": "c", "threadId": "t", "runId": "r"}
    with live(Gate(), tmp_path) as client:
        headers = {"content-type": "application/json"}
        response = client.http.post(path, content=json.dumps({**ids, **body}), headers=headers)
        assert (response.status_code, reason in response.json()["error"]["message"]) == (400, True)
        for name in ("id",) if path == "/api/chat" else ("threadId", "runId"):
            messages = [{"id": "m", "role": "user", "content": "p"}]
            response = client.http.post(path, json={**ids, "messages": messages, name: " "})
            assert response.json()["error"]["message"].startswith(f"{name} must be 1 to 255")
        assert client.get("/api/tasks")["total"] == 0


def test_ai_sdk_shows_what_was_refused(tmp_path: Path) -> None:
    """The client's own error holds the reason."""
    with (
        live(Gate(), tmp_path, max_prompt=10) as client,
        front_end(tmp_path / "node", AI_SDK_CLIENT, client.url, "c") as chat,
    ):
        shown = chat("send", "longer than that")
        assert shown["status"] == "error"
        assert "1 to 10 characters" in shown["error"]


@pytest.mark.parametrize("package", ["@ag-ui/client", "ag-ui-client-before-1"])
def test_ag_ui_shows_a_run(tmp_path: Path, package: str) -> None:
    """Two roles at once, a cut connection, a failure, a refusal: role by role the log's text."""
    team = TwoAtOnce()
    with (
        live(team, tmp_path, max_prompt=10) as client,
        front_end(tmp_path / "node", AG_UI_CLIENT, client.url, "t", package) as agent,
    ):
        agent("begin", ["r1", "two"])
        agent.until(lambda shown: "4 <script>" in json.dumps(shown["messages"]))
        agent("stop")
        team.go.set()
        shown = agent("again", "r1")
        assert (shown.get("error"), shown["result"]["answer"]) == (None, 42)
        task_id = client.get("/api/tasks")["items"][0]["id"]
        assert spoken_in_ag_ui(shown["messages"]) == spoken_in_log(client, task_id)
        assert shown["types"][:2] == ["RUN_STARTED", "MESSAGES_SNAPSHOT"]
        assert (shown["state"]["task_id"], shown["state"]["status"]) == (task_id, "SUCCEEDED")
        shown = agent("send", ["r2", "fail"])
        assert shown["types"][-1] == "RUN_ERROR"
        assert client.get("/api/tasks")["total"] == 2
        assert spoken_in_ag_ui(shown["messages"])["Alex"].count("9 <script>") == 2
        assert "1 to 10 characters" in agent("send", ["r3", "much too long"])["error"]
        assert client.get("/api/tasks")["total"] == 2


def painter(run: Run) -> dict[str, Any]:
    """Asks twice, and says what it was told."""
    told: list[str] = []
    for question, choices in (("Which colour?", ["red", "blue"]), ("How large?", None)):
        run.emit("TOKEN", {"message": f"{question} ", "call_id": str(len(told))}, "Painter")
        told.append(run.ask(question, choices, "Painter"))
        run.emit("TOKEN", {"message": f"{told[-1]}. ", "call_id": str(len(told))}, "Painter")
    return {"told": told}


def test_ai_sdk_answers_with_the_next_message(tmp_path: Path) -> None:
    """A question ends the client's turn; the next message answers it, once, and the run goes on."""
    with (
        live(painter, tmp_path) as client,
        front_end(tmp_path / "node", AI_SDK_CLIENT, client.url, "c") as chat,
    ):
        shown = chat("send", "paint")
        assert (shown["status"], len(shown["messages"])) == ("ready", 2)
        (question,) = (p for p in shown["messages"][1]["parts"] if p["type"] == "data-question")
        assert question["data"]["choices"] == ["red", "blue"]
        assert "answer must be one of red, blue, not 'green'" in chat("send", "green")["error"]
        shown = chat("send", "red")
        assert (shown["status"], shown["messages"][-1]["parts"][0]["text"]) == (
            "ready",
            "red. How large? ",
        )
        again = chat("again", "red")  # as a client does whose answer was lost
        assert again["messages"][-1]["parts"] == shown["messages"][-1]["parts"]
        shown = chat("resume")
        assert shown["messages"][-1]["id"] == again["messages"][-1]["id"]
        shown = chat("send", "as a house")
        (task,) = client.get("/api/tasks")["items"]
        assert client.get(f"/api/tasks/{task['id']}/state")["final_result"]["told"] == [
            "red",
            "as a house",
        ]
        texts = [m for m in shown["messages"] if m["role"] == "assistant"]
        spoken = "".join(spoken_in_chat(message)["Painter"] for message in texts)
        assert {"Painter": spoken} == spoken_in_log(client, task["id"])


@pytest.mark.parametrize("package", ["@ag-ui/client", "ag-ui-client-before-1"])
def test_ag_ui_answers_with_the_next_message(tmp_path: Path, package: str) -> None:
    """A question ends the client's run; the next message answers it, once, and the task goes on."""
    with (
        live(painter, tmp_path) as client,
        front_end(tmp_path / "node", AG_UI_CLIENT, client.url, "t", package) as agent,
    ):
        shown = agent("send", ["r1", "paint"])
        assert (shown.get("error"), shown["types"][-1]) == (None, "RUN_FINISHED")
        assert agent("again", "r1")["messages"] == shown["messages"]  # it is no answer
        agent("send", ["r2", "red"])
        agent("again", "r2")
        shown = agent("send", ["r3", "as a house"])
        assert shown["result"]["told"] == ["red", "as a house"]
        (task,) = client.get("/api/tasks")["items"]
        assert spoken_in_ag_ui(shown["messages"]) == spoken_in_log(client, task["id"])


class RawConversation:
    """One conversation over either protocol; each message of its user has a number."""

    def __init__(self, client: Client, path: str) -> None:
        self._client = client
        self._path = path

    def post(self, number: int, text: str, **more: Any) -> httpx2.Response:
        """Without the messages before, and so without what the client has shown."""
        messages = [{"id": f"m{number}", "role": "user", "content": text}]
        body = {"id": "c", "threadId": "c", "runId": f"r{number}", "messages": messages, **more}
        return self._client.http.post(self._path, json=body)

    def says(self, number: int, text: str, **more: Any) -> str:
        """What the roles answer."""
        lines = self.post(number, text, **more).text.splitlines()
        sent = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        return "".join(message["delta"] for message in sent if "delta" in message)


PROTOCOL_PATHS = ["/api/chat", "/ag-ui"]


@pytest.mark.parametrize("path", PROTOCOL_PATHS)
def test_conversation_gives_a_message_its_turn_again(tmp_path: Path, path: str) -> None:
    """Whatever came between: an answer is neither the next question's, nor a task of its own."""
    with live(painter, tmp_path) as client:
        chat = RawConversation(client, path)
        turns = [
            (1, "paint", "Which colour? "),
            (2, "red", "red. How large? "),
            (3, "as a house", "as a house. "),
        ]
        for last in range(3):
            for number, text, answer in (turns[last], *turns[: last + 1]):
                assert chat.says(number, text) == answer
            assert "How large" not in chat.post(1, "paint").text  # nor the state of a later turn
        if path == "/ag-ui":  # a run of its own, whose last message is an old one
            assert chat.says(2, "red", runId="r9") == "red. How large? "
        (task,) = client.get("/api/tasks")["items"]
        result = client.get(f"/api/tasks/{task['id']}/state")["final_result"]
        assert result["told"] == ["red", "as a house"]
        assert chat.says(4, "draw") == "Which colour? "
        assert chat.says(1, "paint") == "Which colour? "  # it is the first task's still
        assert client.get("/api/tasks")["total"] == 2
        assert chat.says(5, "blue") == "blue. How large? "


@pytest.mark.parametrize("path", PROTOCOL_PATHS)
def test_conversation_takes_an_answer_once_that_comes_at_once(tmp_path: Path, path: str) -> None:
    """Eight connections with the same answer show the same turn."""
    with live(painter, tmp_path) as client:
        chat = RawConversation(client, path)
        chat.says(1, "paint")
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda _: chat.says(2, "red"), range(8)))
        assert answers == ["red. How large? "] * 8
        (task,) = client.get("/api/tasks")["items"]
        log = whole_log(client, task["id"])
        assert [e["event_type"] for e in log].count("ANSWER") == 1


@pytest.mark.parametrize("path", PROTOCOL_PATHS)
def test_conversation_refuses_beside_an_answer_what_it_refuses_elsewhere(
    tmp_path: Path, path: str
) -> None:
    """Options that are none, and another request under the same name; the question stays open."""
    with live(painter, tmp_path) as client:
        chat = RawConversation(client, path)
        chat.says(1, "paint")
        options = {"n_rounds": 3}
        refused = chat.post(2, "red", options=options, forwardedProps={"options": options})
        assert (refused.status_code, "n_rounds" in refused.text) == (400, True)
        options = {"n_round": 3}
        refused = chat.post(1, "paint", options=options, forwardedProps={"options": options})
        assert refused.status_code == 422
        assert "this message came before, with other options" in refused.text
        assert chat.says(2, "red") == "red. How large? "


class Debater:
    """It speaks, waits for the test, asks once for each "?" of its prompt, and fails if told."""

    def __init__(self) -> None:
        self.go = threading.Event()

    def __call__(self, run: Run) -> dict[str, Any]:
        told = []
        run.emit("TOKEN", {"message": "Well. ", "call_id": "0"}, "Alex")
        while not self.go.is_set():
            run.wait(0.01)
        for number in range(run.prompt.count("?")):
            told.append(run.ask(f"q{number}?", None, "Alex"))
            run.emit("TOKEN", {"message": f"{told[-1]}. ", "call_id": str(number + 1)}, "Alex")
        if "fail" in run.prompt:
            raise RuntimeError("that is no plan")
        return {"told": told}


@contextlib.contextmanager
def chatting(client: Client, folder: Path, package: str) -> Iterator[Callable[..., dict[str, Any]]]:
    """An official client of either protocol: says a text, or does what it is told."""
    numbers = itertools.count(1)
    if package == "ai":
        with front_end(folder, AI_SDK_CLIENT, client.url, "c") as chat:
            yield lambda text, action="send": chat(action, text)
        return
    with front_end(folder, AG_UI_CLIENT, client.url, "c", package) as agent:
        yield lambda text, action="send": agent(action, [f"r{next(numbers)}", text])


CHAT_PACKAGES = ["ai", "@ag-ui/client", "ag-ui-client-before-1"]


def prompts(client: Client) -> list[str]:
    """Of all tasks, the oldest first."""
    return [task["input_prompt"] for task in client.get("/api/tasks")["items"]][::-1]


@pytest.mark.parametrize("package", CHAT_PACKAGES)
@pytest.mark.parametrize("gone", ["cancelled", "deleted"])
def test_chat_refuses_an_answer_that_comes_too_late(
    tmp_path: Path, package: str, gone: str
) -> None:
    """The client shows why, and it starts no task; the message after it does."""
    with live(painter, tmp_path) as client, chatting(client, tmp_path / "n", package) as says:
        says("paint")
        path = f"/api/tasks/{client.get('/api/tasks')['items'][0]['id']}"
        if gone == "deleted":
            assert client.http.delete(path).status_code == 204
        else:
            assert client.post(f"{path}/cancel").status_code == 202
        why = "not found" if gone == "deleted" else "is not open"
        assert why in says("red")["error"]
        if package == "ai":
            assert why in says("", "regenerate")["error"]
        assert says("paint it").get("error") is None
        assert prompts(client)[-1] == "paint it"
        assert "red" not in prompts(client)


@pytest.mark.parametrize("package", CHAT_PACKAGES)
def test_chat_refuses_an_answer_to_a_deleted_task_that_said_nothing(
    tmp_path: Path, package: str
) -> None:
    """Of which an AG-UI client shows no message."""

    def runner(run: Run) -> None:
        run.ask("Which?")

    with live(runner, tmp_path) as client, chatting(client, tmp_path / "n", package) as says:
        says("paint")
        (task,) = client.get("/api/tasks")["items"]
        assert client.http.delete(f"/api/tasks/{task['id']}").status_code == 204
        assert "not found" in says("red")["error"]
        assert prompts(client) == []
        assert says("draw").get("error") is None
        assert prompts(client) == ["draw"]


@pytest.mark.parametrize("package", CHAT_PACKAGES)
def test_chat_answers_no_question_that_it_has_not_shown(tmp_path: Path, package: str) -> None:
    """Neither one asked after its connection was cut, nor the one after a question it has shown."""
    team = Debater()
    with live(team, tmp_path) as client, chatting(client, tmp_path / "n", package) as says:
        says("one?", "begin")
        wait_until(lambda: "Well" in json.dumps(says("", "look")["messages"]))
        (first,) = client.get("/api/tasks")["items"]
        says("", "stop")
        team.go.set()
        wait_until(lambda: "question" in client.get(f"/api/tasks/{first['id']}/state"))
        says("two??")
        assert prompts(client) == ["one?", "two??"]
        second = client.get("/api/tasks")["items"][0]["id"]
        question = client.get(f"/api/tasks/{second}/state")["question"]
        answer = {"question_id": question["question_id"], "answer": "by the page"}
        assert client.http.post(f"/api/tasks/{second}/answers", json=answer).status_code == 202
        assert "is not open" in says("an answer")["error"]
        says("why??")
        assert prompts(client) == ["one?", "two??", "why??"]
        assert client.get(f"/api/tasks/{second}/state")["question"]["message"] == "q1?"


def test_ai_sdk_answers_the_task_that_it_has_shown(tmp_path: Path) -> None:
    """A refused answer sent again shows its task; an answer goes to the task its tab has shown."""
    with (
        live(painter, tmp_path) as client,
        front_end(tmp_path / "node", AI_SDK_CLIENT, client.url, "c") as chat,
        front_end(tmp_path / "tab", AI_SDK_CLIENT, client.url, "c") as other_tab,
    ):
        chat("send", "paint")
        assert "must be one of red, blue" in chat("send", "green")["error"]
        assert chat("regenerate")["status"] == "ready"
        assert prompts(client) == ["paint"]
        other_tab("resume")
        chat("edit first", "draw")
        assert prompts(client) == ["paint", "draw"]
        shown = other_tab("send", "red")
        assert shown["messages"][-1]["parts"][0]["text"] == "red. How large? "


def test_ai_sdk_takes_an_edited_prompt_for_no_answer(tmp_path: Path) -> None:
    """Edited or asked again, a message that is older than the question is not what answers it."""
    with (
        live(painter, tmp_path) as client,
        front_end(tmp_path / "node", AI_SDK_CLIENT, client.url, "c") as chat,
    ):
        first = chat("send", "paint")["messages"][1]
        assert chat("regenerate")["messages"][1]["parts"] == first["parts"]  # its task lives
        shown = chat("edit first", "draw")
        assert prompts(client) == ["paint", "draw"]
        assert shown["messages"][1]["id"] != first["id"]
        chat("send", "blue")
        last = chat("send", "as a house")
        assert last["status"] == "ready"
        shown = chat("regenerate")  # an answer's: its whole task runs again
        assert prompts(client) == ["paint", "draw", "draw"]
        assert shown["messages"][-1]["parts"][0]["text"] == "Which colour? "


@pytest.mark.parametrize("package", ["@ag-ui/client", "ag-ui-client-before-1"])
def test_ag_ui_shows_a_question_again(tmp_path: Path, package: str) -> None:
    """A run without a new message is no answer."""
    with (
        live(painter, tmp_path) as client,
        front_end(tmp_path / "node", AG_UI_CLIENT, client.url, "t", package) as agent,
    ):
        shown = agent("send", ["r1", "paint"])
        question = shown["state"]["question"]
        again = agent("again", "r9")
        assert (again["state"]["question"], again["types"][-1]) == (question, "RUN_FINISHED")
        assert spoken_in_ag_ui(again["messages"]) == spoken_in_ag_ui(shown["messages"])


def test_ag_ui_gives_a_long_history_back_whole(tmp_path: Path) -> None:
    """A run that comes again ends as the first one did, and replaces all of its messages."""
    with live(painter, tmp_path) as client:
        history = [{"id": f"a{n}", "role": "assistant", "content": "x"} for n in range(20_000)]
        body = {"threadId": "long", "runId": "r", "messages": history}
        history.append({"id": "m", "role": "user", "content": "paint"})
        first, second = (client.http.post("/ag-ui", json=body).text for _ in range(2))
        (snapshot,) = (line for line in second.splitlines() if "MESSAGES_SNAPSHOT" in line)
        assert json.loads(snapshot.removeprefix("data: "))["messages"] == history
        assert first.splitlines()[-2] == second.splitlines()[-2]


def test_ag_ui_gives_an_answer_its_turn_again_after_a_later_task(tmp_path: Path) -> None:
    """By the history, which was cut behind it; the state is the later task's, and asks."""
    with live(painter, tmp_path) as client:
        chat = RawConversation(client, "/ag-ui")
        (text_id,) = set(re.findall(r'"messageId":"([^"]*)"', chat.post(1, "paint").text))
        chat.says(2, "red")
        chat.says(3, "as a house")
        chat.says(4, "draw")
        first, second = prompts(client)
        state = client.get(f"/api/tasks/{client.get('/api/tasks')['items'][0]['id']}/state")
        history = [
            {"id": "m1", "role": "user", "content": "paint"},
            {"id": text_id, "role": "assistant", "content": "Which colour? "},
            {"id": "m2", "role": "user", "content": "red"},
        ]
        for run_id in ("r2", "r9"):
            again = {"messages": history, "state": state, "runId": run_id}
            assert chat.says(2, "red", **again) == "red. How large? "
        assert (first, second) == tuple(prompts(client))
        log = whole_log(client, state["task_id"])
        assert "ANSWER" not in [event["event_type"] for event in log]


@pytest.mark.parametrize("db", [None, "tasks.db"])
def test_ag_ui_starts_one_task_for_a_message(tmp_path: Path, db: str | None) -> None:
    """However many runs ask for it at once; another run asks again once it has ended."""
    team = Gate()
    more = {} if db is None else {"db": tmp_path / db}
    with live(team, tmp_path, **more) as client:
        chat = RawConversation(client, "/ag-ui")
        with ThreadPoolExecutor(8) as pool:
            runs = [pool.submit(chat.post, 1, "build", runId=f"r{n}") for n in range(8)]
            wait_until(lambda: client.get("/healthz")["clients"] == 8)
            team.go.set()
            assert {run.result().status_code for run in runs} == {200}
        assert team.runs == 1
        chat.says(1, "build", runId="r8")
        chat.says(1, "build", runId="r8")
        assert team.runs == 2


def test_conversation_goes_on_when_its_task_runs_again(tmp_path: Path) -> None:
    """An answer of the first run is none in the second; who resumes sees what is asked now."""
    team = Debater()
    team.go.set()
    with live(team, tmp_path) as client:
        chat = RawConversation(client, "/api/chat")
        chat.says(1, "fail?")
        assert chat.says(2, "yes") == "yes. "
        (task,) = client.get("/api/tasks")["items"]
        assert task["status"] == "FAILED"
        assert client.post(f"/api/tasks/{task['id']}/run?restart=true").status_code == 202
        assert chat.says(2, "yes") == "yes. Well. "
        assert "q0?" in client.http.get("/api/chat/c/stream").text
        assert chat.says(3, "no") == "no. "
        log = whole_log(client, task["id"])
        answers = [e["payload"]["message"] for e in log if e["event_type"] == "ANSWER"]
        assert answers == ["yes", "no"]


def test_conversation_that_finds_no_room_leaves_no_task(tmp_path: Path) -> None:
    """It is refused as it was before there was one, and nothing runs in it."""
    team = Gate()
    with live(team, tmp_path, max_running=1, max_waiting=0) as client:
        client.post(f"/api/tasks/{client.create()}/run")
        refused = RawConversation(client, "/api/chat").post(1, "build")
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "5")
        assert client.get("/api/tasks")["total"] == 1
        assert client.http.get("/api/chat/c/stream").status_code == 204
        blank = RawConversation(client, "/ag-ui").post(1, " ")
        assert "the text of the user's last message must be 1 to" in blank.text


@pytest.mark.parametrize("path", PROTOCOL_PATHS)
def test_conversations_that_find_no_room_at_once_leave_no_task(tmp_path: Path, path: str) -> None:
    """With SQLite, where others come between the look for room and the task."""
    team = Gate()
    with live(team, tmp_path, max_running=1, max_waiting=1, db=tmp_path / "t.db") as client:

        def ask(number: int) -> int:
            body = {"id": f"c{number}", "threadId": f"c{number}"}
            return RawConversation(client, path).post(1, "build", **body).status_code

        with ThreadPoolExecutor(12) as pool:
            asked = [pool.submit(ask, number) for number in range(12)]
            wait_until(lambda: sum(each.done() for each in asked) == 10)
            team.go.set()
            statuses = sorted(each.result() for each in asked)
        assert statuses == [200] * 2 + [429] * 10
        assert client.get("/healthz")["tasks"] == {"SUCCEEDED": 2}


def test_conversation_begins_nothing_that_it_cannot_show(tmp_path: Path) -> None:
    """Where nobody more may watch, no task is created and no question answered."""
    with live(painter, tmp_path, max_sockets=1) as client:
        chat = RawConversation(client, "/api/chat")
        chat.says(1, "paint")
        (task,) = client.get("/api/tasks")["items"]
        with client.socket(task["id"]) as websocket:
            websocket.recv()
            for path in PROTOCOL_PATHS:
                refused = RawConversation(client, path).post(2, "red")
                assert (refused.status_code, "max_sockets" in refused.text) == (503, True)
        assert client.get("/api/tasks")["total"] == 1
        assert chat.says(2, "red") == "red. How large? "


def test_cancelled_task_takes_no_answer(tmp_path: Path) -> None:
    """Not even before its run has ended."""
    with live(painter, tmp_path) as client:
        for _ in range(5):
            watcher = client.follow(client.create())
            question = asked(watcher)
            client.post(f"/api/tasks/{watcher.task_id}/cancel")
            assert answer(client, watcher.task_id, question, "red").status_code == 409
            watcher.join()


def test_ag_ui_tells_steps_of_one_name_apart(tmp_path: Path) -> None:
    """Which the client's verifier demands of steps at the same time."""

    def runner(run: Run) -> None:
        for role, action in (("A: B", "C"), ("A", "B: C")):
            run.emit("AGENT_START", {"message": "starts", "action": action}, role)

    with live(runner, tmp_path) as client:
        text = RawConversation(client, "/ag-ui").post(1, "build").text
        for kind in ("STEP_STARTED", "STEP_FINISHED"):
            assert re.findall(rf'"{kind}","stepName":"([^"]*)"', text) == ["A: B: C", "A: B: C (3)"]


def test_run_asks_one_question_after_the_other_however_much_is_said(tmp_path: Path) -> None:
    """Each is open until its answer is in the log, while others keep the outbox full."""

    def runner(run: Run) -> dict[str, Any]:
        with others_speaking(run), others_speaking(run), ThreadPoolExecutor(3) as pool:
            return {"told": sorted(pool.map(lambda n: run.ask(f"q{n}?"), range(12)))}

    with live(runner, tmp_path) as client:
        task_id = client.create()
        client.post(f"/api/tasks/{task_id}/run")
        told: list[str] = []

        def newly_asked() -> dict[str, Any]:
            question = client.get(f"/api/tasks/{task_id}/state").get("question")
            return {} if question is None or question["question_id"] in told else dict(question)

        for number in range(12):
            told.append(wait_until(newly_asked)["question_id"])
            answer = {"question_id": told[-1], "answer": f"{number:02}"}
            path = f"/api/tasks/{task_id}/answers"
            assert client.http.post(path, json=answer).status_code == 202
        settled(client, task_id)
        result = client.get(f"/api/tasks/{task_id}/state")["final_result"]
        assert result["told"] == [f"{number:02}" for number in range(12)]


@pytest.mark.parametrize("package", ["@ag-ui/client", "ag-ui-client-before-1"])
def test_ag_ui_is_told_of_a_cancel(tmp_path: Path, package: str) -> None:
    with (
        live(TwoAtOnce(), tmp_path) as client,
        front_end(tmp_path / "node", AG_UI_CLIENT, client.url, "t", package) as agent,
    ):
        agent("begin", ["r1", "two"])
        state = agent.until(lambda shown: shown["state"].get("status") == "RUNNING")["state"]
        assert client.post(f"/api/tasks/{state['task_id']}/cancel").status_code == 202
        shown = agent.until(lambda shown: "RUN_ERROR" in shown["types"])
        assert "cancelled by a client" in json.dumps(shown)


def test_conversation_is_known_to_every_replica(tmp_path: Path, redis_server: RedisServer) -> None:
    """With Redis either replica goes on with a conversation, and gives a message's task again."""
    message = {"id": "m1", "role": "user", "parts": [{"type": "text", "text": "first"}]}
    body = {"id": "c", "messages": [message]}
    team = TwoAtOnce()
    redis_server("FLUSHALL")
    url = redis_server.url
    with (
        live(team, tmp_path, redis_url=url) as one,
        live(team, tmp_path, redis_url=url) as two,
    ):
        with one.http.stream("POST", "/api/chat", json=body) as stream:
            start = next(stream.iter_lines())
        task_id = json.loads(start.removeprefix("data: "))["messageId"]
        with two.http.stream("GET", "/api/chat/c/stream") as stream:
            assert next(stream.iter_lines()) == start
        team.go.set()
        assert two.http.post("/api/chat", json=body).text.startswith(start)
        assert [task["id"] for task in two.get("/api/tasks")["items"]] == [task_id]
        assert two.http.get("/api/chat/c/stream").status_code == 204
        assert two.http.get("/api/chat/other/stream").status_code == 204
        assert int(redis_server("TTL", "streamer:conversation:ai-sdk:c")) > 7 * 86400


def test_turn_ends_at_its_question_on_every_replica(
    tmp_path: Path, redis_server: RedisServer
) -> None:
    """Also where events are read from Redis that are newer than the state that was read."""

    def runner(run: Run) -> None:
        with others_speaking(run, pause=0.002):
            for number in range(20):
                run.wait(0.01)
                run.ask(f"q{number}?", None, "Alex")

    redis_server("FLUSHALL")
    url = redis_server.url
    with live(runner, tmp_path, redis_url=url) as one, live(runner, tmp_path, redis_url=url) as two:
        RawConversation(one, "/api/chat").post(1, "ask")
        chat = RawConversation(two, "/api/chat")
        for number in range(2, 21):
            assert f'"message":"q{number - 1}?"' in chat.post(number, "go on").text
        assert '"finishReason":"stop"' in chat.post(21, "go on").text


# -----------------------------------------------------------------------------
# Security
# -----------------------------------------------------------------------------

TOKEN = "t0ken-that-nobody-may-see"
FOREIGN = (
    "null",
    "http://evil.test",
    "http://localhost.evil.test",
    "http://evil-localhost",
    "https://127.0.0.1.evil.test",
    "file://",
    "x",
)


def refusals(client: Client, headers: dict[str, str], query: str = "") -> tuple[str, str]:
    """The code a socket and a POST with these headers are refused with, and nothing was created."""
    before = client.get("/healthz")["tasks"]
    posted = client.http.post(f"/api/tasks?{query}", json={"input_prompt": "p"}, headers=headers)
    others = {name: value for name, value in headers.items() if name not in ("Host", "Origin")}
    host, port = client.address
    uri = f"ws://{headers.get('Host', f'{host}:{port}')}/ws/tasks/none?{query}"
    origin: Any = headers.get("Origin")
    with (
        raw_request(client, b"") as sock,
        connect(uri, sock=sock, origin=origin, additional_headers=others) as websocket,
    ):
        error = json.loads(websocket.recv(timeout=TIMEOUT))
        assert error["type"] == "error"
        with pytest.raises(ConnectionClosed):
            websocket.recv(timeout=TIMEOUT)
        assert websocket.close_code == (4404 if error["data"]["code"] == "task_not_found" else 1008)
    created = posted.status_code == 201
    pending = client.get("/healthz")["tasks"].get("PENDING", 0)
    assert pending == before.get("PENDING", 0) + created
    return error["data"]["code"], "" if created else posted.json()["error"]["code"]


def test_origins_of_other_pages_are_refused(tmp_path: Path) -> None:
    """`null`, look-alikes and other ports are; its own page's, configured ones and none are not."""
    with live(burst(1), tmp_path, allowed_origins=("https://app.test", "http://[::1]:9")) as client:
        own = client.url
        port = client.address[1]
        for origin in (
            *FOREIGN,
            f"http://127.0.0.1:{port + 1}",
            "http://127.0.0.1",
            f"http://localhost:{port}",
            "https://app.test:444",
            "https://app.test.evil.test",
            "http://app.test",
        ):
            assert refusals(client, {"Origin": origin}) == ("forbidden", "forbidden"), origin
            assert client.http.get("/api/tasks", headers={"Origin": origin}).status_code == 403
        for origin in (
            own,
            own.upper(),
            "https://app.test",
            "HTTPS://APP.test:443",
            "http://[::1]:9",
        ):
            assert refusals(client, {"Origin": origin}) == ("task_not_found", ""), origin
        assert refusals(client, {}) == ("task_not_found", "")
        preflight = {
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "content-type",
        }
        allowed = client.http.options(
            "/api/tasks", headers={"Origin": "https://app.test", **preflight}
        )
        assert (allowed.status_code, allowed.headers["access-control-allow-origin"]) == (
            200,
            "https://app.test",
        )
        denied = client.http.options(
            "/api/tasks", headers={"Origin": "http://evil.test", **preflight}
        )
        assert "access-control-allow-origin" not in denied.headers
    with live(burst(1), tmp_path) as client:  # no CORS by default
        denied = client.http.options("/api/tasks", headers={"Origin": own, **preflight})
        assert denied.status_code == 403  # the own page of another port
        assert "access-control-allow-origin" not in denied.headers


def test_allowed_page_may_send_credentials_and_reach_loopback(tmp_path: Path) -> None:
    """What a browser asks before it sends them, and before the internet's page may come here."""
    origin = "https://app.example.com"
    asked = {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "content-type",
        "Access-Control-Request-Private-Network": "true",
    }
    with live(burst(1), tmp_path, allowed_origins=(origin,)) as client:
        told = client.http.options("/api/tasks", headers=asked)
        assert told.status_code == 200
        assert told.headers["access-control-allow-origin"] == origin
        assert told.headers["access-control-allow-credentials"] == "true"
        assert told.headers["access-control-allow-private-network"] == "true"
        response = client.http.get("/api/tasks", headers={"Origin": origin, "Cookie": "a=b"})
        assert response.headers["access-control-allow-origin"] == origin


def test_hosts_by_other_names_are_refused(tmp_path: Path) -> None:
    """Names made to point here (DNS rebinding) are; loopback names and configured ones are not."""
    with live(burst(1), tmp_path, allowed_hosts=("streamer.test",)) as client:
        for host in (
            "evil.test",
            "127.0.0.1.evil.test",
            "localhost.evil.test:80",
            "streamer.test.",
            "0.0.0.0",
            "[::2]:1",
            "10.0.0.1",
        ):
            assert refusals(client, {"Host": host}) == (
                "misdirected_request",
                "misdirected_request",
            ), host
        for host in (
            "localhost",
            "LOCALHOST:1",
            "127.0.0.1",
            "127.1.2.3:9",
            "[::1]:8000",
            "[::1]",
            "streamer.test:443",
        ):
            assert refusals(client, {"Host": host}) == ("task_not_found", ""), host
        for host in (
            "localhost\r\nHost: evil.test",
            "127.0.0.1:x",
            "a@127.0.0.1",
            "127.0.0.1/",
            "",
        ):
            answer = raw_answer(client, f"GET /api/tasks HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
            assert answer.startswith(b"HTTP/1.1 421"), host
        named = raw_answer(client, b"GET /api/tasks HTTP/1.1\r\nHost: 127.0.0.1:\r\n\r\n")
        assert named.startswith(b"HTTP/1.1 200")
        assert raw_answer(client, b"GET /api/tasks HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 421")
        probe = client.http.get("/healthz", headers={"Host": "10.244.0.5:8000"})  # of Kubernetes
        assert (probe.status_code, probe.json()["status"]) == (200, "ok")
        for headers in ({"Host": "evil.test", "Origin": "http://other.test"}, {"Origin": "null"}):
            assert client.http.get("/healthz", headers=headers).status_code == 403


def test_token_opens_and_nothing_else_does(tmp_path: Path) -> None:
    """By header anywhere, by query for sockets and SSE only; 401 says how; never seen again."""
    with process(SERVER, "--test-mode", "--port", "0", "--token", TOKEN, cwd=tmp_path) as server:
        client = server.client
        bearer = {"Authorization": f"Bearer {TOKEN}"}
        for path in ("/", "/healthz"):
            assert client.http.get(path).status_code == 200
        for headers in (
            {},
            {"Authorization": TOKEN},
            {"Authorization": f"Basic {TOKEN}"},
            {"Authorization": "Bearer"},
            {"Authorization": f"Bearer {TOKEN}x"},
            {"Authorization": f"Bearer {TOKEN[:-1]}"},
        ):
            assert refusals(client, headers) == ("unauthorized", "unauthorized")
            answer = client.http.get("/api/tasks", headers=headers)
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
        assert refusals(client, {}, f"token={TOKEN}") == ("task_not_found", "unauthorized")
        created = client.http.post(
            "/api/tasks", json={"input_prompt": f"my {TOKEN}"}, headers=bearer
        )
        assert created.status_code == 201
        task_id = created.json()["id"]
        for path in ("", f"/{task_id}/artifacts/events", f"/{task_id}/state/events", "/a/b/events"):
            assert client.http.get(f"/api/tasks{path}?token={TOKEN}").status_code == 401
        assert client.http.get("/metrics").status_code == 401
        assert (
            client.http.get(f"/api/tasks/?token={TOKEN}", follow_redirects=False).status_code == 401
        )
        slashed = client.http.get("/api/tasks/", headers=bearer, follow_redirects=False)
        assert (slashed.status_code, "location" in slashed.headers) == (404, False)
        with client.socket(task_id, f"start=true&token={TOKEN}") as websocket:
            receive_until(websocket, is_event("TASK_START"))
        client.http.post(f"/api/tasks/{task_id}/cancel", headers=bearer)
        stream = client.http.get(
            f"/api/tasks/{task_id}/events?token={TOKEN}", headers={"Accept": "text/event-stream"}
        )
        events = [line for line in stream.text.splitlines() if '"type":"event"' in line]
        assert [TOKEN in line for line in events] == [False] * stream.text.count("\nid: ")
        assert "TASK_CANCELLED" in events[-1]
        with process(
            "test_streamer.py", task_id, "--url", client.url, "--token", TOKEN, cwd=HERE
        ) as watcher:
            assert watcher.wait() == 1
            assert b"cancelled by a client" in watcher.output
        server.stop()
        assert TOKEN not in "".join(server.errors)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (
            ["--host", "0.0.0.0"],
            "can be reached from other machines, so a token is needed: set STREAMER_TOKEN",
        ),
        (["--host", "::"], "so a token is needed"),
        (["--host", "0.0.0.0", "--token", "short"], "token must be at least 8 characters"),
        (["--token", "with blanks in it"], "ASCII without blanks"),
        (
            ["--allowed-origins", "*"],
            "allowed_origins must be as browsers send them: https://example.com",
        ),
        (["--allowed-origins", "http://a.test,https://b.test/path"], "not 'https://b.test/path'"),
        (
            ["--allowed-origins", "HTTPS://App.test"],
            "in lower case, without the scheme's own port, not 'HTTPS://App.test'",
        ),
        (["--allowed-hosts", "a.test:80"], "without a port, not 'a.test:80'"),
    ],
)
def test_wrong_access_settings_exit_2(tmp_path: Path, arguments: list[str], complaint: str) -> None:
    with process(SERVER, "--test-mode", "--port", "0", *arguments, cwd=tmp_path) as server:
        assert server.wait() == 2
    assert complaint in server.errors[-1]
    assert "short" not in server.errors[-1]


def test_other_machines_reach_it_with_a_token(tmp_path: Path) -> None:
    """Bound to every address: by the names it was given, with the token."""
    command = [
        "--test-mode",
        "--port",
        "0",
        "--host",
        "0.0.0.0",
        "--token",
        TOKEN,
        "--allowed-hosts",
        "box.test",
    ]
    with process(SERVER, *command, cwd=tmp_path) as server:
        client = server.client
        port = client.url.rsplit(":", 1)[1]
        for host, status in (("box.test", 200), ("0.0.0.0", 200), ("other.test", 421)):
            headers = {"Host": f"{host}:{port}", "Authorization": f"Bearer {TOKEN}"}
            assert client.http.get("/api/tasks", headers=headers).status_code == status
        client.http.close()


HOSTILE_PAGE = """<!doctype html><script>
async function attempt(name, work) {
  try { return [name, await work()]; } catch (error) { return [name, "failed"]; }
}
async function attack(at, id) {
  const body = JSON.stringify({input_prompt: "p"}), events = `${at}/api/tasks/${id}/events`;
  const send = set => fetch(at + "/api/tasks", {method: "POST", body, ...set});
  const post = headers => send({headers}).then(answer => answer.status);
  return Object.fromEntries(await Promise.all([
    attempt("json", () => post({"Content-Type": "application/json"})),
    attempt("simple", () => send({mode: "no-cors"}).then(() => "sent")),
    attempt("read", () => fetch(at + "/api/tasks").then(answer => answer.text())),
    attempt("events", () => new Promise((resolve, reject) => {
      const source = new EventSource(events);
      source.onmessage = () => resolve("read"); source.onerror = reject;
    })),
    attempt("socket", () => new Promise(resolve => {
      const socket = new WebSocket(at.replace("http", "ws") + "/ws/tasks/" + id);
      socket.onmessage = ({data}) => resolve(JSON.parse(data).data.code || "read");
      socket.onclose = ({code}) => resolve(code);
    })),
  ]));
}
</script>"""


def test_hostile_page_in_a_real_browser_gets_nothing(tmp_path: Path, chromium: Any) -> None:
    """From another origin no task is created, started or read; an allowed one can do all of it."""

    async def page(request: Request) -> Response:
        return Response(HOSTILE_PAGE, media_type="text/html")

    config = uvicorn.Config(Starlette(routes=[Route("/", page)]), log_config=None)
    with serving(uvicorn.Server(config), loopback()) as hostile:
        for allowed in ((), (hostile,)):
            with live(burst(1), tmp_path, allowed_origins=allowed) as client:
                task_id = client.create()
                chromium.goto(hostile)
                got = chromium.evaluate("([at, id]) => attack(at, id)", [client.url, task_id])
                if allowed:
                    assert (got["json"], got["events"], got["socket"]) == (201, "read", "read")
                    assert '"items"' in got["read"]
                else:
                    assert got == {
                        "json": "failed",
                        "simple": "sent",
                        "read": "failed",
                        "events": "failed",
                        "socket": "forbidden",
                    }
                    assert client.get("/healthz")["tasks"] == {"PENDING": 1}


def test_page_works_with_a_token(tmp_path: Path, chromium: Any) -> None:
    """It is asked for where it is missing, and a reload does not lose it."""
    with live(burst(3), tmp_path, token=TOKEN) as client:
        chromium.goto(client.url)
        chromium.wait_for_selector("#login[open]")
        assert chromium.locator("dialog:modal button.primary").all_inner_texts() == ["Open"]
        chromium.keyboard.type(TOKEN)
        chromium.keyboard.press("Enter")
        chromium.wait_for_selector("#login", state="hidden")
        start(chromium, "p")
        chromium.wait_for_selector("#status.SUCCEEDED")
        chromium.reload()
        chromium.wait_for_selector("#status.SUCCEEDED")
        assert TOKEN not in chromium.url


def test_answers_carry_their_headers_and_errors_tell_nothing(tmp_path: Path) -> None:
    """Of the server: no path, version or stack, whatever fails."""

    async def broken(task_id: str) -> Any:
        raise KeyError(f"{HERE}/secret")

    settings = Settings(workspace=tmp_path, test_mode=True)
    store = streamer.MemoryStore(settings)
    app = create_app(settings, runner=burst(1), store=store)
    with serving(streamer.Server(app, settings), loopback()) as url:
        client = Client(url)
        task_id = client.create()
        client.watch(task_id)
        answers = [
            client.http.get(path)
            for path in ("/", "/healthz", "/metrics", "/nothing", f"/api/tasks/{task_id}")
        ]
        answers += [
            client.http.get(f"/api/tasks/{task_id}/artifacts/%00"),
            client.http.put("/api/tasks"),
        ]
        answers.append(client.http.get("/", headers={"Host": "evil.test"}))
        store.load = broken  # type: ignore[method-assign]
        answers.append(client.http.get(f"/api/tasks/{task_id}"))
        client.http.close()
    assert [answer.status_code for answer in answers] == [
        200,
        200,
        200,
        404,
        200,
        404,
        405,
        421,
        500,
    ]
    for answer in answers:
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cache-control"] == "no-store"
        if answer.status_code >= 400:
            assert set(answer.json()["error"]) == {"code", "message"}
            assert not re.search(
                r"Traceback|KeyError|\.py|starlette|uvicorn|\d\.\d+\.\d", answer.text
            )
            assert str(HERE) not in answer.text


def test_errors_405_name_all_methods(tmp_path: Path) -> None:
    """Also where a path has several routes."""
    with live(burst(1), tmp_path) as client:
        for path, allowed in (
            ("/api/tasks", "GET, HEAD, POST"),
            ("/api/tasks/x", "DELETE, GET, HEAD"),
            ("/api/tasks/x/run", "POST"),
            ("/healthz", "GET, HEAD"),
        ):
            answer = client.http.put(path)
            assert (answer.status_code, answer.headers["allow"]) == (405, allowed)


def test_run_tests_needs_the_operators_word(tmp_path: Path) -> None:
    body = {"input_prompt": "p", "options": {"run_tests": True}}
    with live(burst(1), tmp_path) as client:
        answer = client.http.post("/api/tasks", json=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "forbidden")
        assert "--allow-run-tests" in answer.json()["error"]["message"]
    with live(burst(1), tmp_path, allow_run_tests=True) as client:
        assert client.http.post("/api/tasks", json=body).status_code == 201


def test_artifact_that_is_swapped_during_the_request(tmp_path: Path) -> None:
    """A name that turns into a link out and back, ten thousand times: never the other file."""
    root = tmp_path / "task"
    secret = tmp_path / "secret.txt"
    root.mkdir()
    secret.write_text("secret")
    (root / "real.txt").write_text("mine")
    (root / "link.txt").symlink_to(secret)
    os.mkfifo(root / "fifo")
    done = threading.Event()

    def swap() -> None:
        while not done.is_set():
            for name in ("real.txt", "link.txt"):
                os.link(root / name, root / "next", follow_symlinks=False)
                os.replace(root / "next", root / "file.txt")

    swapper = threading.Thread(target=swap)
    swapper.start()
    found = Counter[str]()
    for _ in range(10_000):
        if file := streamer.open_inside(root, "file.txt"):
            with file:
                found[file.read().decode()] += 1
    done.set()
    swapper.join()
    assert set(found) == {"mine"}
    before = len(os.listdir("/dev/fd"))
    assert streamer.open_inside(root, "fifo") is None
    assert streamer.open_inside(root, "") is None
    assert len(os.listdir("/dev/fd")) == before


def test_heads_that_do_not_end_are_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that says nothing, half a request, or a head of megabytes is cut off."""
    monkeypatch.setattr(streamer.AbortProtocol, "PATIENCE", 0.3)
    with live(burst(1), tmp_path, max_sockets=1) as client:
        half = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n"
        endless = b"POST /api/tasks HTTP/1.1\r\nHost: evil\r\nContent-Length: 99\r\n\r\nx"
        with raw_request(client, endless) as sock:
            assert sock.recv(100).startswith(b"HTTP/1.1 421")
            sock.sendall(b"x")
            read_to_end(sock)
        for request in (b"", half, half + b"X: " + b"x" * 10_000_000, b"GET /" + b"x" * 10_000_000):
            with raw_request(client, b"") as sock:
                with contextlib.suppress(ConnectionError):  # it is cut off while it sends
                    sock.sendall(request)
                assert read_to_end(sock) == b""
            assert client.get("/healthz")["status"] == "ok"
        assert client.watch(client.create()).last_state["status"] == "SUCCEEDED"


def test_live_stream_outlasts_half_a_request_behind_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The patience with a head is no limit of an answer that is being given."""
    monkeypatch.setattr(streamer.AbortProtocol, "PATIENCE", 0.2)
    gate = Gate()
    with live(gate, tmp_path) as client:
        task_id = client.create()
        head = f"GET /api/tasks/{task_id}/events HTTP/1.1\r\nHost: localhost\r\n"
        request = f"{head}Accept: text/event-stream\r\n\r\nGET /hea"
        with raw_request(client, request.encode()) as sock:
            witness = client.follow(task_id)
            assert witness.lives(1.0)
            gate.go.set()
            witness.join()
            assert b"TASK_COMPLETE" in read_until(sock, b"TASK_COMPLETE")


def test_download_that_stalls_is_ended(tmp_path: Path) -> None:
    """What a client does not read for send_timeout is cut off, and its file closed."""
    size = 16 << 20

    def runner(run: Run) -> None:
        run.workspace.mkdir()
        (run.workspace / "large.bin").write_bytes(random.Random(1).randbytes(size))

    with live(runner, tmp_path, send_timeout=0.3) as client:
        task_id = client.create()
        client.watch(task_id)
        before = len(os.listdir("/dev/fd"))
        for name in ("artifacts/large.bin", "artifacts.zip"):
            head = f"GET /api/tasks/{task_id}/{name} HTTP/1.1\r\nHost: localhost\r\n\r\n"
            with raw_socket(client) as stalled:
                stalled.sendall(head.encode())
                assert stalled.recv(12) == b"HTTP/1.1 200"
                wait_until(lambda: len(os.listdir("/dev/fd")) <= before + 1)
                assert 0 < len(read_to_end(stalled)) < size
        assert client.get("/healthz")["status"] == "ok"


def test_connections_beyond_the_limit_are_refused(tmp_path: Path) -> None:
    """max_sockets and 1000 more are served; then 503, until some are gone."""
    with live(burst(1), tmp_path, max_sockets=1) as client:
        kept = [raw_request(client, b"") for _ in range(1001)]
        assert raw_answer(client, b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n").startswith(
            b"HTTP/1.1 503"
        )
        for sock in kept:
            sock.close()
        assert client.watch(client.create()).last_state["status"] == "SUCCEEDED"


def test_warnings_that_strangers_cause_pass_once_a_second() -> None:
    """uvicorn's, each text for itself, with how many were left out; other lines all pass."""
    passed: list[str] = []
    for level, created, text in [
        (logging.WARNING, 100.0, "Exceeded."),
        (logging.WARNING, 100.5, "Invalid."),
        *[(logging.WARNING, 100.9, "Exceeded.")] * 3,
        *[(logging.INFO, 100.9, "Shutting down")] * 2,
        (logging.WARNING, 101.0, "Exceeded."),
        (logging.WARNING, 102.0, "Exceeded."),
    ]:
        fields = {"levelno": level, "created": created, "msg": text}
        record = logging.makeLogRecord(fields)
        if streamer.once_a_second(record):
            passed.append(record.getMessage())
    more = "Exceeded. And 3 more since this was last logged"
    down = "Shutting down"
    assert passed == ["Exceeded.", "Invalid.", down, down, more, "Exceeded."]


@contextlib.contextmanager
def without_descriptors(pid: int = 0) -> Iterator[None]:
    """The process can open nothing meanwhile; what it has open works on."""
    before = resource.prlimit(
        pid, resource.RLIMIT_NOFILE, (3, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    )
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)


def test_files_are_not_gone_where_no_descriptor_is_left(tmp_path: Path) -> None:
    """Out of resources is 503, and no event of a run."""
    with process("-c", QUICK, "--test-mode", "--port", "0", cwd=tmp_path) as server:
        client = server.client
        task_id = client.watch(client.create()).task_id
        base = f"/api/tasks/{task_id}/artifacts"
        for path in (base, f"{base}/docs/prd.md", f"{base}.zip"):
            with without_descriptors(server.popen.pid):
                response = client.http.get(path)
            error = response.json()["error"]
            assert (response.status_code, error["code"]) == (503, "out_of_resources")
            assert "Too many open files" in error["message"]
            assert client.http.get(path).status_code == 200
    run = Run(make_task(), Settings(workspace=tmp_path))
    run.workspace.mkdir()
    (run.workspace / "a.txt").write_text("a")
    assert run.report_files() == ["a.txt"]
    with without_descriptors(), pytest.raises(OSError, match="Too many open files"):
        run.report_files()
    assert run.report_files() == ["a.txt"]
    assert len(run.outbox.take()) == 1


LIMITED = """
import resource, sys, streamer
limit = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
sys.exit(streamer.main())
"""


def test_few_descriptors_serve_what_there_is_room_for(tmp_path: Path) -> None:
    """It says how much that is, and keeps to it; connections beyond it cost no descriptor."""
    command = ("-c", LIMITED, "64", "--test-mode", "--port", "0", "--max-running", "10")
    with process(*command, cwd=tmp_path) as server:
        client = server.client
        says = "`ulimit -n` is 64, so that it serves 10 connections at once; "
        says += "10 runs (max_running) and 2000 connections need 4044"
        assert says in server.errors[0]
        tasks = [client.create() for _ in range(12)]
        for task_id in tasks:
            assert client.post(f"/api/tasks/{task_id}/run").status_code == 202
        health = client.get("/healthz")
        assert (health["running"], health["waiting"]) == (10, 2)
        with contextlib.ExitStack() as stack:
            idle = [stack.enter_context(raw_request(client, b"")) for _ in range(60)]
            assert read_to_end(idle[-1]) == b""
            assert client.http.get("/healthz").status_code == 503
        wait_until(lambda: client.http.get("/healthz").status_code == 200)
        for task_id in tasks:
            assert client.watch(task_id).last_state["status"] == "SUCCEEDED"
    with process("-c", LIMITED, "40", "--test-mode", "--port", "0", cwd=tmp_path) as server:
        assert server.wait() == 2
    assert "`ulimit -n` is 40, too few to serve anything; 4 runs" in server.errors[-1]


def test_model_cannot_forge_events_log_lines_or_terminal_escapes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it says stays in the text of the events that say it."""
    forged = '"}}}\n{"type":"event","data":{"event_id":99}}\x1b]0;owned\x07\x1b[2J\n'
    forged += "task id=x status=SUCCEEDED"

    def runner(run: Run) -> None:
        run.emit("MESSAGE", {"message": forged, "content": forged}, forged[:60])
        run.emit("TOKEN", {"message": forged, "call_id": forged}, "Engineer")
        raise streamer.RunFailed(forged)

    transcript = streamer.Transcript()
    with caplog.at_level("INFO", "streamer"), live(runner, tmp_path) as client:
        record = client.watch(client.create(forged, title=forged))
        assert record.ids == [1, 2, 3, 4]
        path = f"/api/tasks/{record.task_id}/events"
        lines = client.http.get(path, headers={"Accept": "text/event-stream"}).text.splitlines()
        assert [line for line in lines if line.startswith("id: ")] == [
            "id: 1",
            "id: 2",
            "id: 3",
            "id: 4",
        ]
        for message in record.messages:
            transcript.show(message)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", capsys.readouterr().out)
    lines = [record.getMessage() for record in caplog.records]
    assert sum(f"id={record.task_id}" in line for line in lines) == 4  # PENDING to FAILED, and why
    assert [line for line in lines if "\n" in line or "\x1b" in line] == []


def test_fuzzed_service_neither_fails_nor_grows(tmp_path: Path) -> None:
    """Routes, frames and messages, right and bent: no 500, no hang, no traceback, no growth."""
    seed = int(os.environ.get("FUZZ_SEED", "7"))
    seconds = float(os.environ.get("FUZZ_SECONDS", "5"))
    with busy(
        tmp_path, max_events=50, max_tasks=20, max_sockets=50, send_timeout=2, grace=0.2
    ) as server:
        fuzzer = Fuzzer(server.client, seed)
        fuzzer.go(seconds / 2)
        before = cpu_and_rss(server)[1]
        fuzzer.go(seconds / 2)
        count = sum(fuzzer.statuses.values())
        print(f"seed {seed}: {count} requests {dict(fuzzer.statuses)}, {fuzzer.frames} frames")
        assert fuzzer.faults == []
        assert server.client.get("/healthz")["status"] == "ok"
        witness = server.client.follow(fuzzer.fresh_task())
        witness.sees(5)
        assert server.client.post(f"/api/tasks/{witness.task_id}/cancel").status_code == 202
        assert witness.join()[-1]["event_type"] == "TASK_CANCELLED"
        assert cpu_and_rss(server)[1] - before < 30  # MB
        said = "".join(server.errors)
        assert "Traceback" not in said, said[said.find("Traceback") - 500 :][:5000]


class Fuzzer:
    """Requests and frames that are right in most of their parts and wrong in some."""

    VALUES: tuple[Any, ...] = (
        0,
        -1,
        10**30,
        0.5,
        True,
        None,
        "",
        "x",
        "\ud800",
        "x" * 70_000,
        [],
        {},
        [[[]]],
        {"a": 1},
        "😀",
        "\x00",
        "NaN",
        "\u202e",
    )
    SEGMENTS = (
        "api",
        "tasks",
        "ws",
        "events",
        "artifacts",
        "artifacts.zip",
        "state",
        "run",
        "cancel",
        "answers",
        "healthz",
        "metrics",
        "..",
        ".",
        "%2e%2e",
        "%00",
        "%ff",
        "%252e",
        "",
        "~",
        "x" * 300,
        "{}",
        "\u00e9".encode().decode("latin-1"),
    )
    QUERIES = (
        "after",
        "limit",
        "types",
        "start",
        "page",
        "page_size",
        "status",
        "restart",
        "token",
    )
    HEADERS = (
        "Accept: text/event-stream",
        "Accept: */*",
        "Last-Event-ID: 3",
        "Last-Event-ID: x",
        "Origin: null",
        "Range: bytes=0-5,9-",
        "Range: bytes=9-1",
        "Idempotency-Key: k",
        "Idempotency-Key:",
        "Content-Type: text/plain",
        "Expect: 100-continue",
        "Connection: upgrade",
        "Upgrade: websocket",
        "Upgrade: h2c",
        "Host: evil",
        "Authorization: Bearer x",
        "Transfer-Encoding: gzip",
        "If-Range: x",
        "X-\xff: \xff",
        "Cookie: " + "c" * 5000,
    )

    def __init__(self, client: Client, seed: int) -> None:
        self.client = client
        self.chance = random.Random(seed)
        self.address = client.url.removeprefix("http://").split(":")
        self.statuses = Counter[str]()
        self.frames = 0
        self.faults = list[str]()
        self.tasks: list[str] = []

    def go(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if not self.tasks or self.chance.random() < 0.05:
                self.tasks = [*self.tasks[-5:], self.fresh_task()]
            self.chance.choice((self.request, self.request, self.request, self.talk))()

    def fresh_task(self) -> str:
        for item in self.client.get("/api/tasks?page_size=100")["items"]:
            self.client.http.delete(f"/api/tasks/{item['id']}")
        return self.client.create("0.01")

    def value(self) -> Any:
        return self.chance.choice(self.VALUES)

    def path(self) -> str:
        pick = self.chance.choice
        task = self.chance.choice(self.tasks)
        good = [
            f"/api/tasks/{task}{end}"
            for end in (
                "",
                "/state",
                "/run",
                "/cancel",
                "/events",
                "/artifacts",
                "/artifacts/a",
                "/artifacts.zip",
            )
        ]
        path = pick(
            [*good, "/api/tasks", "/api/tasks", "/", "/healthz", "/metrics", f"/ws/tasks/{task}"]
        )
        if self.chance.random() < 0.3:
            parts = path.split("/")
            parts[self.chance.randrange(len(parts))] = pick(self.SEGMENTS)
            path = "/" + "/".join(parts).lstrip("/")
        values = [
            "0",
            "5",
            "-1",
            "9" * 20,
            "x",
            "",
            "true",
            "TOKEN,LOG",
            "%00",
            "PENDING",
            "1e3",
            "\u0662".encode().decode("latin-1"),
        ]
        query = "&".join(
            f"{pick(self.QUERIES)}={pick(values)}" for _ in range(self.chance.randrange(4))
        )
        return f"{path}?{query}" if query else path

    def body(self) -> bytes:
        options = {name: self.value() for name in self.chance.sample(list(streamer.OPTIONS), 2)}
        fields = {
            "input_prompt": "0.01",
            "title": "t",
            "options": self.chance.choice(({}, options)),
        }
        for name in self.chance.sample([*fields, "more"], self.chance.choice((0, 0, 1, 2))):
            fields[name] = self.value()
        text = json.dumps(fields).encode()
        cut = self.chance.randrange(len(text))
        return self.chance.choice(
            (text, text, text, text[:cut], text[:cut] + b"\xff" + text[cut:], b"[" * 3000, b"")
        )

    def request(self) -> None:
        path = self.path()
        posts = (
            "/run" in path
            or "/cancel" in path
            or (path.startswith("/api/tasks") and self.chance.random() < 0.5)
        )
        method = "POST" if posts else "GET"
        if self.chance.random() < 0.3:
            method = self.chance.choice(
                ("POST", "DELETE", "PUT", "HEAD", "OPTIONS", "PATCH", "G\x00T", "get")
            )
        headers = ["Host: localhost", "Connection: close"]
        headers += self.chance.sample(self.HEADERS, self.chance.choice((0, 0, 1, 2, 3)))
        body = self.body() if method in ("POST", "PUT") or self.chance.random() < 0.1 else b""
        if body:
            length = (
                len(body)
                if self.chance.random() < 0.95
                else self.chance.choice((0, 1, len(body) + 9, -1))
            )
            chunked = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
            framing, body = self.chance.choice(
                ((f"Content-Length: {length}", body), ("Transfer-Encoding: chunked", chunked))
            )
            headers += [framing, "Content-Type: application/json"]
        head = f"{method} {path} HTTP/1.1\r\n" + "".join(f"{header}\r\n" for header in headers)
        self.send(head.encode("latin-1", "replace") + b"\r\n" + body)

    def send(self, data: bytes) -> None:
        with socket.create_connection((self.address[0], int(self.address[1])), TIMEOUT) as sock:
            with contextlib.suppress(ConnectionError):
                sock.sendall(data)
            answer = b""
            stream = b"event-stream" in data or b"pgrade" in data or b"100-continue" in data
            sock.settimeout(
                0.2 if stream else 5
            )  # a body that never comes is answered in send_timeout
            with contextlib.suppress(ConnectionError):
                try:
                    while chunk := sock.recv(65536):
                        answer += chunk
                except TimeoutError:
                    if not stream and not answer:
                        self.faults.append(f"no answer to {data[:300]!r}")
        status = answer[9:12].decode() if answer.startswith(b"HTTP/1.1 ") else "none"
        self.statuses[status] += 1
        if status == "500" or (status.startswith("5") and b'"code"' not in answer):
            self.faults.append(f"{answer[:200]!r} to {data[:300]!r}")

    def frame(self) -> bytes:
        pick = self.chance.choice
        message: Any = pick(
            (
                {"type": "ping"},
                {"type": "cancel"},
                {"type": self.value()},
                {},
                [],
                self.value(),
                {"type": "ping", "more": self.value()},
            )
        )
        payload = pick(
            (
                json.dumps(message).encode(),
                json.dumps(message).encode(),
                b"\xff\xfe",
                b"{",
                b"x" * 70_000,
                b"[" * 5000,
            )
        )
        opcode = pick((1, 1, 1, 1, 2, 0, 3, 8, 9, 10, 15))
        frame = bytearray(masked(opcode, payload[: 125 if opcode > 7 else None]))
        if self.chance.random() < 0.1:
            frame[self.chance.randrange(min(len(frame), 14))] ^= 1 << self.chance.randrange(8)
        return bytes(frame)

    def talk(self) -> None:
        with (
            contextlib.suppress(ConnectionError, TimeoutError),
            raw_websocket(self.client, self.chance.choice(self.tasks)) as sock,
        ):
            sock.settimeout(0.05)
            for _ in range(self.chance.randrange(1, 12)):
                sock.sendall(self.frame())
                self.frames += 1
                with contextlib.suppress(TimeoutError):
                    if not sock.recv(65536):
                        break


# -----------------------------------------------------------------------------
# The page
# -----------------------------------------------------------------------------

CHROMIUM_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-sync",
    "--remote-debugging-port=0",
)
ODD_TEXT = "<script>alert(1)</script> **bold** 😀 مرحبا بالعالم <img src=x onerror=alert(2)>"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a real Chromium, headless, for the tests of this file."""
    executable = needs("chromium")
    needs_package("playwright")
    profile = tmp_path_factory.mktemp("chromium")
    command = [executable, *CHROMIUM_FLAGS, f"--user-data-dir={profile}"]
    quiet = subprocess.DEVNULL
    with subprocess.Popen(command, stdout=quiet, stderr=quiet) as process:
        port_file = profile / "DevToolsActivePort"
        wait_until(lambda: port_file.exists() and port_file.read_text().count("\n"))
        yield f"http://127.0.0.1:{port_file.read_text().split()[0]}"
        process.terminate()


@pytest.fixture
def chromium(browser: str) -> Iterator[Any]:
    """A page of its own in it; an error in the page or a blocked resource fails the test."""
    with importlib.import_module("playwright.sync_api").sync_playwright() as playwright:
        connection = playwright.chromium.connect_over_cdp(browser)
        context = connection.new_context(
            viewport={"width": 1280, "height": 900}, accept_downloads=True
        )
        context.set_default_timeout(1000 * TIMEOUT)
        faults: list[str] = []
        context.on("weberror", lambda error: faults.append(str(error.error)))
        context.on(
            "console",
            lambda said: (
                faults.append(said.text) if "Content Security Policy" in said.text else None
            ),
        )
        context.on("dialog", lambda dialog: faults.append(dialog.message))
        yield context.new_page()
        context.close()
        assert faults == []


def fits(page: Any) -> bool:
    """Nothing sticks out to the right."""
    return bool(page.evaluate("document.documentElement.scrollWidth <= innerWidth"))


def start(page: Any, prompt: str) -> None:
    page.fill("#prompt", prompt)
    page.click("#start")


def receive(page: Any, kind: str, **data: Any) -> None:
    """Has the page take a message as if its socket had brought it."""
    page.evaluate(
        "message => view.socket.onmessage({data: JSON.stringify(message)})",
        {"type": kind, "data": data},
    )


def team_event(page: Any, kind: str, role: str | None, **payload: Any) -> None:
    """The same of an event, with the next number."""
    receive(
        page,
        "event",
        event_id=page.evaluate("view.sent = (view.sent || view.last) + 1"),
        event_type=kind,
        agent_role=role,
        payload={"message": "", **payload},
        timestamp=streamer.now(),
    )


@contextlib.contextmanager
def watched_page(page: Any, workspace: Path, **body: Any) -> Iterator[tuple[Client, Any, Gate]]:
    """A page on a task that runs until the gate opens; what it shows is the test's to say."""
    gate = Gate()
    with live(gate, workspace) as client:
        task_id = client.create(**body)
        client.post(f"/api/tasks/{task_id}/run")
        page.goto(f"{client.url}/#{task_id}")
        page.wait_for_selector("#status.RUNNING")
        page.wait_for_selector("#feed:has-text('before')")
        yield client, page, gate
        page.goto("about:blank")


def test_page_shows_a_run_from_prompt_to_files(scripted: Client, chromium: Any) -> None:
    """Typed, started, watched, opened, downloaded; by mouse and keyboard; odd text stays text."""
    page = chromium
    page.goto(scripted.url)
    assert "test mode" in page.inner_text("#mode")
    page.click("summary:has-text('Options')")
    page.fill("[name=n_round]", "3")
    page.uncheck("[name=code_review]")
    page.fill("#prompt", ODD_TEXT)
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#team > :has-text('Engineer'):has-text('waits')")
    page.wait_for_selector("#status.SUCCEEDED")
    assert page.locator("#team > :has-text('Product Manager'):has-text('done') i").count() == 1
    assert page.locator("#feed .doc h4").first.inner_text() == "Requirements"
    assert page.locator("#feed p:has-text('Architect designs the system')").count() == 1
    assert fits(page)
    task = scripted.get("/api/tasks")["items"][0]
    assert task["input_prompt"] == ODD_TEXT
    assert (task["options"]["n_round"], task["options"]["code_review"]) == (3, False)
    assert page.inner_text("#title") == ODD_TEXT
    assert page.locator("main script, main img, nav script, nav img").count() == 0
    assert page.locator("#feed > li:has-text('You asked')").inner_text().endswith(ODD_TEXT)
    assert [line.split("\n")[0] for line in page.locator("#team > li").all_inner_texts()] == [
        "PM",
        "Arc",
        "PJ",
        "Eng",
    ]
    assert page.locator("#feed .TASK_COMPLETE").count() == 1
    assert page.inner_text("#feed .MESSAGE >> nth=0") == "created docs/prd.md → everybody"
    page.click("#feed .MESSAGE button >> nth=0")
    page.wait_for_selector("#content h4:has-text('Requirements')")
    assert ODD_TEXT.replace("**", "") in page.inner_text("#content")
    page.keyboard.press("Escape")
    page.click("#files button:has-text('app.py')")
    page.wait_for_selector("dialog[open] #content:has-text('TodoList')")
    with page.expect_download() as one:
        page.click("#save")
    assert one.value.suggested_filename == "app.py"
    page.keyboard.press("Escape")
    assert page.locator("dialog[open]").count() == 0
    with page.expect_download() as download:
        page.click("#zip")
    names = zipfile.ZipFile(download.value.path()).namelist()
    documents = ["docs/prd.md", "docs/system_design.md", "docs/task.md"]
    assert names == [*documents, "src/app.py", "tests/test_app.py"]
    for scheme in ("dark", "light"):
        page.emulate_media(color_scheme=scheme)
        page.set_viewport_size({"width": 360, "height": 740})
        assert fits(page)


def test_page_asks_what_the_team_asks(tmp_path: Path, chromium: Any) -> None:
    """A team is chosen by name; a question is answered by the keyboard, by button or text."""
    page = chromium

    def runner(run: Run) -> dict[str, Any]:
        colour = run.ask(f"<b>Which?</b> {ODD_TEXT}", ["red", "blue"], "Painter", free_text=True)
        return {"team": run.options["team"], "colour": colour, "more": run.ask("More?", ["no"])}

    settings = Settings(workspace=tmp_path, test_mode=True, grace=5.0)
    app = create_app(settings, runner=runner, teams={"painters": lambda context, prompt: []})
    with serving(streamer.Server(app, settings), loopback()) as url:
        client = Client(url)
        page.goto(url)
        page.click("summary:has-text('Options')")
        page.select_option("[name=team]", "painters")
        page.fill("[name=approve]", "Paint, Draw")
        page.fill("#prompt", "Paint")
        page.click("#start")
        page.wait_for_selector("#question:has-text('Painter asks you'):has-text('<b>Which?</b>')")
        assert fits(page)
        page.fill("#answer", " ")
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        page.wait_for_selector("#notice:has-text('not only blanks')")
        page.fill("#answer", ODD_TEXT)
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        page.wait_for_selector("#question:has-text('The team asks you'):has-text('More?')")
        assert page.locator("#answer").count() == 0
        posted: list[str] = []
        page.on("request", lambda request: posted.append(request.method))
        page.focus("#question button")
        page.keyboard.press("Space")
        page.keyboard.press("Space")
        page.wait_for_selector("#status.SUCCEEDED")
        assert posted.count("POST") == 1
        assert not page.is_visible("#question")
        assert page.locator("#feed > li:has-text('You answered'):has-text('مرحبا')").count() == 1
        (task,) = client.get("/api/tasks")["items"]
        state = client.get(f"/api/tasks/{task['id']}/state")
        client.http.close()
    assert state["final_result"] == {"team": "painters", "colour": ODD_TEXT, "more": "no"}
    assert task["options"]["approve"] == ["Paint", "Draw"]


def test_page_cancels_runs_again_and_deletes(tmp_path: Path, chromium: Any) -> None:
    """One filled button at a time; a deletion is asked for twice; what fails is said."""
    page = chromium
    gate = Gate()
    with live(gate, tmp_path) as client:
        page.goto(client.url)
        assert page.locator(":focus").get_attribute("id") == "prompt"
        start(page, "😀")
        page.wait_for_selector("#status.RUNNING")
        assert page.locator("button.primary:visible").count() == 0
        page.click("#cancel")
        page.wait_for_selector("#status.CANCELLED")
        assert page.locator("button.primary:visible").all_inner_texts() == ["Run again"]
        gate.go.set()
        page.click("#run")
        page.wait_for_selector("#status.SUCCEEDED")
        assert page.locator("#feed > li:has-text('You asked')").count() == 2
        task_id = client.get("/api/tasks")["items"][0]["id"]
        waiting = client.create("x" * 32000)
        page.goto(f"{client.url}/#{waiting}")
        page.wait_for_selector("#status.PENDING")
        assert page.locator("button.primary:visible").all_inner_texts() == ["Run"]
        assert client.get(f"/api/tasks/{waiting}")["status"] == "PENDING"  # to look is not to start
        assert fits(page)
        assert client.http.delete(f"/api/tasks/{waiting}").status_code == 204
        page.wait_for_selector("#failure:has-text('it was deleted')")
        assert page.locator("#top button:visible").count() == 0
        page.goto(f"{client.url}/#{task_id}")
        page.wait_for_selector("#status.SUCCEEDED")
        assert not page.locator("#delete").is_visible()
        page.click("#more")
        page.click("#delete")
        page.wait_for_selector("#home:visible")
        assert client.http.get(f"/api/tasks/{task_id}").status_code == 404
        assert page.input_value("#prompt") == ""
        start(page, "x" * 32001)
        page.wait_for_selector("#notice:has-text('1 to 32000 characters')")
        assert page.locator("#start").is_enabled()


def test_page_says_what_it_cannot_do(tmp_path: Path, chromium: Any) -> None:
    """A proxy that fails for a moment, a file that is gone, a browser without a clipboard."""
    page = chromium
    with live(burst(1), tmp_path) as client:
        task_id = client.create()
        client.watch(task_id)
        page.route(f"**/api/tasks/{task_id}", lambda route: route.fulfill(status=502))
        page.goto(f"{client.url}/#{task_id}")
        page.wait_for_selector("#notice:has-text('Trying again in')")
        page.unroute_all()
        page.evaluate("retry()")
        page.wait_for_selector("#status.SUCCEEDED")
        page.evaluate("file('gone.txt').click()")
        page.wait_for_selector("#notice:has-text('not found')")
        page.evaluate("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
        page.evaluate("present('a.md', 'text', 'md')")
        page.click("#copy")
        page.wait_for_selector("#copy:has-text('needs https')")
        assert (
            page.evaluate("spaced('QaEngineer') + spaced('WritePRD_a')") == "QA EngineerWrite PRD a"
        )


def test_page_leaves_nothing_of_a_task_behind(tmp_path: Path, chromium: Any) -> None:
    """A question whether to delete, asked of one task, is gone with it; so is its log."""
    page = chromium
    with live(burst(1), tmp_path) as client:
        for title in ("first", "second"):
            task_id = client.create(title)
            page.goto(f"{client.url}/#{task_id}")
            page.wait_for_selector(f"#title:has-text('{title}')")
            page.wait_for_selector("#status.PENDING")
        page.click("#more")
        page.wait_for_selector("#delete:visible")
        page.go_back()
        page.wait_for_selector("#title:has-text('first')")
        assert page.locator("#delete").is_hidden()
        page.click("#run")
        page.wait_for_selector("#status.SUCCEEDED")
        page.check("#log")
        page.click("nav > a")
        page.wait_for_selector("#home:visible")
        assert page.locator(":focus").get_attribute("id") == "prompt"


def test_page_sees_that_somebody_else_runs_a_task_again(tmp_path: Path, chromium: Any) -> None:
    """A page on a task that has ended goes on with it."""
    with watched_page(chromium, tmp_path) as (client, page, gate):
        task_id = page.evaluate("view.id")
        client.post(f"/api/tasks/{task_id}/cancel")
        page.wait_for_selector("#feed .TASK_CANCELLED")
        gate.go.set()
        client.post(f"/api/tasks/{task_id}/run?restart=true")
        page.wait_for_selector("#status.SUCCEEDED")
        assert page.locator("#feed > li:has-text('You asked')").count() == 2
        assert page.locator("#feed .note:has-text('connected again')").count() == 0


def test_page_starts_one_task_however_often_one_clicks(tmp_path: Path, chromium: Any) -> None:
    """Start is disabled while it posts; an example fills the box; the options go by their names."""
    page = chromium
    with live(burst(1), tmp_path) as client:
        page.goto(client.url)
        page.click("#examples button >> nth=1")
        page.evaluate("() => { $('start').click(); $('start').click(); }")
        page.wait_for_selector("#status.SUCCEEDED")
        (task,) = client.get("/api/tasks")["items"]
        assert task["input_prompt"] == "A snake game for the browser"
        page.goto(client.url)
        titles = page.locator("#home [name]").evaluate_all("each => each.map(e => e.title)")
        assert set(titles) >= {"n_round", "investment", "timeout", "run_tests", "approve", "team"}


def test_page_offers_the_teams_of_the_server(tmp_path: Path, chromium: Any) -> None:
    """A team and the actions that wait for a person's word go with the task, where chosen."""
    page = chromium
    sent: list[Any] = []

    def tasks(route: Any) -> None:
        if route.request.method == "POST":
            sent.append(route.request.post_data_json)
            route.fulfill(status=400, json={"error": {"code": "invalid", "message": "enough"}})
        else:
            route.continue_()

    with live(burst(1), tmp_path) as client:
        page.route("**/api/tasks", tasks)
        page.route("**/healthz", lambda route: route.fulfill(json={"mode": "x", "teams": ["talk"]}))
        page.goto(client.url)
        page.click("summary:has-text('Options')")
        page.select_option("[name=team]", "talk")
        page.fill("[name=approve]", "WritePRD, WriteDesign")
        start(page, "p")
        page.wait_for_selector("#notice:has-text('enough')")
        page.goto("about:blank")
    (body,) = sent
    assert (body["options"]["team"], body["options"]["approve"]) == (
        "talk",
        ["WritePRD", "WriteDesign"],
    )


def test_page_says_that_a_price_is_unknown(tmp_path: Path, chromium: Any) -> None:
    """No dollars where nobody knows them, but the tokens; nothing before anything is known."""

    def runner(run: Run) -> dict[str, Any]:
        run.update(cost={"prompt_tokens": 1200, "completion_tokens": 34, "total_cost": None})
        return {"cost": run.cost}

    page = chromium
    with live(runner, tmp_path) as client:
        task_id = client.create()
        page.goto(f"{client.url}/#{task_id}")
        page.wait_for_selector("#status.PENDING")
        assert page.inner_text("#facts") == ""
        page.click("#run")
        page.wait_for_selector("#status.SUCCEEDED")
        assert page.inner_text("#facts") == "0:00 · price unknown · 1,234 tokens"
        assert client.get("/api/tasks")["items"][0]["result_summary"] == "price unknown"
        page.goto("about:blank")


def test_page_survives_a_restart_of_the_server(tmp_path: Path, chromium: Any) -> None:
    """Killed under the page and started again: it says so, resumes, and misses no event."""
    page = chromium
    with loopback() as free:
        port = free.getsockname()[1]
    with busy(tmp_path, db="streamer.db", port=port) as server:
        page.goto(server.client.url)
        start(page, "0.02")
        page.wait_for_selector("#now .tail:has-text('token 3 ')")
        server.stop(signal.SIGKILL)
        page.wait_for_selector("#notice:has-text('Trying again in')")
        assert page.locator("#cancel").is_disabled()
    with busy(tmp_path, db="streamer.db", port=port) as server:
        page.wait_for_selector("#status.FAILED")
        page.wait_for_selector("#failure:has-text('interrupted by a restart')")
        assert page.locator("#notice").is_hidden()
        assert page.locator("#run").is_enabled()
        assert page.locator("#feed .note:has-text('connected again, after event')").count() == 1
        log = whole_log(server.client, server.client.get("/api/tasks")["items"][0]["id"])
        tokens = [event["payload"]["message"] for event in log if event["event_type"] == "TOKEN"]
        assert page.locator("#feed .doc p").all_text_contents() == ["".join(tokens)]
        assert page.locator("#feed .TASK_ERROR").count() == 1


def test_page_makes_a_silent_connection_again(tmp_path: Path, chromium: Any) -> None:
    """Open and silent for three heartbeats: it is dropped, and another resumes."""
    chromium.clock.install()
    with watched_page(chromium, tmp_path) as (client, page, gate):
        page.evaluate("() => { silent = view.socket; silent.onmessage = silent.send = () => {}; }")
        page.clock.run_for(50_000)
        page.wait_for_selector("#feed .note:has-text('connected again, after event')")
        assert page.evaluate("silent !== view.socket")
        gate.go.set()
        wait_until(lambda: client.get("/healthz")["tasks"] == {"SUCCEEDED": 1})
        page.clock.run_for(1000)
        page.wait_for_selector("#status.SUCCEEDED")


def test_page_shows_the_task_it_was_asked_for_last(tmp_path: Path, chromium: Any) -> None:
    """One that is slow or not there does not show in another; a log that starts anew comes once."""
    with live(burst(3), tmp_path) as client:
        first, second = client.create("first"), client.create("second")
        client.watch(first)
        chromium.route(f"**/api/tasks/{first}", lambda route: slow.append(route))
        chromium.route("**/api/tasks/deadbeef", lambda route: slow.append(route))
        slow: list[Any] = []
        chromium.goto(f"{client.url}/#{first}")
        chromium.evaluate("location.hash = 'deadbeef'")
        chromium.evaluate(f"location.hash = '{second}'")
        chromium.wait_for_selector("#status.PENDING")
        for route in slow:
            route.continue_()
        chromium.wait_for_load_state("networkidle")
        assert chromium.inner_text("#title") == "second"
        assert chromium.locator("#failure").is_hidden()
        assert chromium.locator("#run").is_visible()
        chromium.wait_for_selector("#link:has-text('live')")
        assert client.get("/healthz")["clients"] == 1
        chromium.unroute_all()
        chromium.evaluate(f"location.hash = '{first}'")
        chromium.wait_for_selector("#status.SUCCEEDED")
        chromium.evaluate("view.last = 99999; connect(view)")
        chromium.wait_for_selector("#feed .TASK_COMPLETE")
        chromium.check("#log")
        assert chromium.locator("#lines p").count() == 3
        chromium.goto(f"{client.url}/#{second}?start=true&x=")
        chromium.wait_for_selector("#failure:has-text('not found')")
        assert client.get(f"/api/tasks/{second}")["status"] == "PENDING"


def test_page_stays_usable_with_5000_events(tmp_path: Path, chromium: Any) -> None:
    """All of them are there, once, in order, behind a switch, and a click still works."""
    page = chromium
    with live(burst(5000), tmp_path) as client:
        page.goto(client.url)
        start(page, "many")
        page.wait_for_selector("#status.SUCCEEDED")
        page.wait_for_selector("#feed .TASK_COMPLETE")
        assert page.locator("#lines p").count() == 0
        page.check("#log")
        page.wait_for_selector("#lines p:has-text('line 4999')", state="attached")
        assert page.locator("#lines p").first.is_visible()
        lines = page.locator("#lines p").all_text_contents()
        assert [line.split(" ", 1)[1] for line in lines] == [f"line {n}" for n in range(5000)]


def test_page_reaches_every_task(tmp_path: Path, chromium: Any) -> None:
    """Fifty at a time, newest first, each with a mark, its age and how long it took."""
    page = chromium
    with live(burst(1), tmp_path) as client:
        first = client.create("first")
        client.watch(first)
        for number in range(101):
            client.create(f"task {number}")
        page.goto(client.url)
        page.wait_for_selector("#tasks li")
        names = page.locator("#tasks .title").all_inner_texts()
        page.click("#older")
        page.wait_for_selector("#tasks li:has-text('task 50')")
        page.click("#older")
        page.wait_for_selector("#tasks li:has-text('first')")
        assert names == [f"task {number}" for number in range(100, 50, -1)]
        assert page.locator("#tasks .title").all_inner_texts() == ["task 0", "first"]
        lines = page.locator("#tasks small").all_inner_texts()
        assert lines == ["pending · just now", "succeeded · just now · 0:00"]
        assert page.locator("#older").is_hidden()
        page.click("#newer")
        page.wait_for_selector("#tasks li:has-text('task 50')")


def test_page_says_that_a_task_is_queued(tmp_path: Path, chromium: Any) -> None:
    """It waits for a slot: that is said, and Run is not offered a second time."""
    gate = Gate()
    with live(gate, tmp_path, max_running=1) as client:
        for _ in range(2):
            task_id = client.create()
            client.post(f"/api/tasks/{task_id}/run")
        chromium.goto(f"{client.url}/#{task_id}")
        chromium.wait_for_selector("#status:has-text('queued')")
        assert chromium.inner_text("#facts") == "waiting for a free slot (max_running)"
        assert chromium.locator("#top button:visible").all_inner_texts() == ["Stop", "Delete …"]
        gate.go.set()
        chromium.wait_for_selector("#status.SUCCEEDED")


def test_page_shows_the_team_at_work(tmp_path: Path, chromium: Any) -> None:
    """Several at once, in plain words, with the last of each text, and cost where it is known."""
    with watched_page(chromium, tmp_path) as (_, page, _):
        for role, action in (("Architect", "WriteDesign"), ("Sam", "SaySomething")):
            team_event(page, "AGENT_START", role, action=action)
        team_event(page, "TOKEN", "Architect", action="WriteDesign", call_id="1", message="of old ")
        team_event(page, "TOKEN", "Sam", action="Say", call_id="2", message="x" * 900 + "the end")
        cost = {"prompt_tokens": 1000, "completion_tokens": 500, "total_cost": 0.0125}
        receive(
            page,
            "state",
            status="RUNNING",
            progress=0.5,
            waiting_on={"agent_role": "Architect", "action": "WriteDesign", "seconds": 12.3},
            cost={**cost, "by_role": {"Sam": cost}},
        )
        page.wait_for_selector("#team > :has-text('Sam'):has-text('$0.0125 · 1,500 tokens')")
        busy = page.locator("#now > :visible")
        assert busy.count() == 2
        assert "designs the system · waits for the model: 0:12" in busy.first.inner_text()
        assert "tokens" not in page.inner_text("#team > :has-text('Architect')")
        assert busy.last.locator(".tail").inner_text() == "x" * 900 + "the end"
        team_event(page, "AGENT_COMPLETE", "Architect", action="WriteDesign")
        team_event(page, "ERROR", "Sam", action="SaySomething", message="Sam failed: why")
        page.wait_for_selector("#team > :has-text('Sam'):has-text('failed')")
        assert page.locator("#team > :has-text('Architect'):has-text('done')").count() == 1
        assert page.locator("#feed .ERROR").inner_text() == "failed: why"
        texts = page.locator("#feed .doc p").all_inner_texts()
        assert texts == ["of old ", "x" * 900 + "the end"]


def test_page_takes_whatever_a_runner_says(tmp_path: Path, chromium: Any) -> None:
    """Payloads of other types than MetaGPT's: each event is told, and the end is seen."""

    def runner(run: Run) -> dict[str, Any]:
        odd = {"action": 5, "call_id": {}, "path": 1, "change": [], "content": 7, "send_to": None}
        for kind in (
            "AGENT_START",
            "TOKEN",
            "MESSAGE",
            "ARTIFACT",
            "LOG",
            "ERROR",
            "AGENT_COMPLETE",
        ):
            run.emit(kind, {"message": f"odd {kind}", **odd}, "constructor")
            run.emit(kind, {"message": f"plain {kind}"})
        return {"files": 3, "cost": "x", "answer": {"nested": [None, 1.5]}}

    with live(runner, tmp_path) as client:
        chromium.goto(client.url)
        start(chromium, "p")
        chromium.wait_for_selector("#status.SUCCEEDED")
        chromium.wait_for_selector("#feed >> text=plain ERROR")
        chromium.wait_for_selector("#feed >> text=odd MESSAGE")


def test_page_tells_of_a_failure_what_why_and_what_to_do(
    tmp_path: Path, chromium: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One card, on top, with the button that runs it again; those who had not begun say so."""

    def runner(run: Run) -> dict[str, Any]:
        run.emit("AGENT_START", {"message": "", "action": "WritePRD"}, "ProductManager")
        run.emit("ERROR", {"message": "broken", "action": "WritePRD"}, "ProductManager")
        raise streamer.RunFailed("the key was refused: check llm.api_key")

    page = chromium
    monkeypatch.setattr(streamer, "run_scripted", runner)
    with live(None, tmp_path) as client:
        page.goto(client.url)
        start(page, "p")
        page.wait_for_selector("#failure:visible")
        what, why, what_to_do = page.locator("#failure > *").all_inner_texts()
        assert what == "It failed · Product Manager · writes the requirements"
        assert why == "the key was refused: check llm.api_key"
        assert "run it again" in what_to_do
        assert page.locator("#team > :has-text('did not begin')").count() == 3
        page.click("#run")
        page.wait_for_selector("#feed .TASK_ERROR >> nth=1")
        assert page.locator("#failure").is_visible()


def test_page_keeps_story_and_log_apart(tmp_path: Path, chromium: Any) -> None:
    """The log is behind a switch; a role's or a kind's rows alone; thoughts are behind a button."""
    with watched_page(chromium, tmp_path) as (_, page, _):
        for role in ("Architect", "Sam"):
            team_event(page, "AGENT_START", role, action="WriteDesign")
            team_event(page, "REASONING", role, message="hm")
            team_event(page, "LOG", role, message=f"log of {role}")
            team_event(page, "ARTIFACT", role, message="m", path=f"a/{role}.py", change="created")
            team_event(page, "MESSAGE", role, message=f"{role} to <all>: done")
        page.wait_for_selector("#feed >> text=to everybody: done")

        def rows() -> list[str]:
            return list(page.locator("#feed .told:visible").all_text_contents())

        own = {
            role: ["Thoughts", f"created a/{role}.py", "to everybody: done"]
            for role in ("Architect", "Sam")
        }
        assert rows() == ["before", *own["Architect"], *own["Sam"]]
        page.check("#log")
        assert rows() == []
        page.wait_for_selector("#lines p:has-text('Architect log of Architect'):visible")
        page.uncheck("#log")
        assert page.locator("#lines").is_hidden()
        page.select_option("#who", label="Sam")
        assert rows() == own["Sam"]
        page.select_option("#kind", label="files")
        assert rows() == ["created a/Sam.py"]
        page.select_option("#who", label="everybody")
        assert rows() == ["created a/Architect.py", "created a/Sam.py"]


def test_page_tells_each_thing_once_and_nothing_empty(tmp_path: Path, chromium: Any) -> None:
    """A message that hands over a file is told on that file; code is code, also without a fence."""
    with watched_page(chromium, tmp_path) as (_, page, _):
        role = "ProjectManager"
        team_event(page, "AGENT_START", role, action="WriteCode")
        team_event(
            page, "TOKEN", role, action="WriteCode", call_id="1", message="import os\nx = 'a'"
        )
        team_event(page, "ARTIFACT", role, path="src/app.py", change="created")
        message = f"{role} to <all>: src/app.py"
        team_event(page, "MESSAGE", role, message=message, content="x", send_to=["<all>"])
        team_event(page, "AGENT_COMPLETE", role)
        for receiver in ("Engineer", "Edward"):
            team_event(page, "AGENT_START", "Engineer", action="SummarizeCode")
            content = "app.py" if receiver == "Engineer" else ""
            message = f"Engineer to {receiver}: {content}"
            told = {"message": message, "content": content, "send_to": [receiver]}
            team_event(page, "MESSAGE", "Engineer", **told)
            team_event(page, "AGENT_COMPLETE", "Engineer")
        team_event(page, "MESSAGE", role, message=f"{role} to <all>: done")
        page.wait_for_selector("#feed >> text=to everybody: done")
        turns = page.locator("#feed > li p:first-child .name").all_inner_texts()
        assert turns == ["You", "Engineer", "Project Manager"]
        assert page.locator("#feed .code pre").all_text_contents() == ["1\n2", "import os\nx = 'a'"]
        assert page.locator("#feed .code b, #feed .code q").all_text_contents() == ["import", "'a'"]
        assert page.locator("#feed .ARTIFACT").all_text_contents() == [
            "created src/app.py → everybody"
        ]
        initials = page.locator("#feed .avatar").all_inner_texts()
        assert initials == ["You", "Eng", "PJ"]


def test_page_follows_until_a_person_scrolls(tmp_path: Path, chromium: Any) -> None:
    """The latest stays in sight, not against a person's will; an old task shows its top."""
    with watched_page(chromium, tmp_path) as (_, page, gate):
        below = "main.scrollHeight - main.scrollTop - main.clientHeight"

        def write(number: int) -> None:
            for _ in range(20):
                team_event(page, "MESSAGE", None, message=f"part {number}")
            page.wait_for_selector(f"#feed > :nth-child({2 + 20 * number})")

        write(1)
        write(2)
        wait_until(lambda: page.evaluate(below) < 2)
        page.mouse.move(600, 700)
        page.mouse.wheel(0, -300)
        page.wait_for_selector("#latest:visible")
        where = page.evaluate("main.scrollTop")
        write(3)
        assert page.evaluate("main.scrollTop") == where
        page.click("#latest")
        wait_until(lambda: page.evaluate(below) < 2)
        write(4)
        wait_until(lambda: page.evaluate(below) < 2)
        gate.go.set()
        page.wait_for_selector("#status.SUCCEEDED")
        page.reload()
        page.wait_for_selector("#feed .TASK_COMPLETE")
        assert page.evaluate("main.scrollTop") == 0


def test_page_keeps_a_half_written_answer_and_shows_a_refusal(
    tmp_path: Path, chromium: Any
) -> None:
    """A question is a form on top: words or choices, by keyboard; a refusal is shown."""
    answers: list[Any] = []
    refusal = {"error": {"code": "conflict", "message": "it was answered already"}}

    def answered(route: Any) -> None:
        answers.append(route.request.post_data_json)
        if len(answers) == 1:
            route.fulfill(status=202, json={})
        else:
            route.fulfill(status=409, json=refusal)

    with watched_page(chromium, tmp_path) as (_, page, _):
        state = {"status": "RUNNING", "progress": 0.1, "cost": dict(streamer.NO_COST)}
        page.route("**/answers", answered)
        question = {"question_id": "q1", "message": "**Which** colour?", "agent_role": "Architect"}
        receive(page, "state", **state, question={**question, "choices": None})
        page.wait_for_selector("#question:has-text('Architect asks you') strong:has-text('Which')")
        page.focus("#answer")
        page.keyboard.type("blue")
        receive(page, "state", **state, question={**question, "choices": None})
        team_event(page, "MESSAGE", None, message="meanwhile")
        page.wait_for_selector("#feed >> text=meanwhile")
        assert page.input_value("#answer") == "blue"
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        receive(page, "state", **state)
        page.wait_for_selector("#question", state="hidden")
        receive(
            page,
            "state",
            **state,
            question={**question, "question_id": "q2", "choices": ["a", "b"]},
        )
        page.wait_for_selector("#question button:has-text('b')")
        assert page.locator("#answer").count() == 0
        page.click("#question button:has-text('b')")
        page.wait_for_selector("#notice:has-text('it was answered already')")
        both = {**question, "question_id": "q3", "choices": ["continue"], "free_text": True}
        receive(page, "state", **state, question=both)
        page.fill("#answer", "but blue")
        page.click("#question button:has-text('Answer')")
        wait_until(lambda: len(answers) == 3)
        assert answers == [
            {"question_id": "q1", "answer": "blue"},
            {"question_id": "q2", "answer": "b"},
            {"question_id": "q3", "answer": "but blue"},
        ]


# Texts, and the elements they become: tag, and text where there is nothing inside.
DOCUMENTS = (
    ("# One\n## Two\ntext\nof two", "h4 One|h4 Two|p text\nof two"),
    ("- a\n  - b\n* c\n\n1. d\n2) e", "ul(li a|li b|li c)|ol(li d|li e)"),
    (
        "| A | B |\n|---|:-:|\n| `1` | **2** |",
        "div(table(tr(th A|th B)|tr(td(code 1)|td(strong 2))))",
    ),
    ("```python\nx = 1\n```", "figure(figcaption(span python|button Copy)|div(pre 1|pre x = 1))"),
    ("[here](javascript:alert(1))", "p [here](javascript:alert(1))"),
    ("<img src=x onerror=alert(1)>", "p <img src=x onerror=alert(1)>"),
    ("a\u202eb\u2066c", "p a[U+202E]b[U+2066]c"),
    (
        '[CONTENT]{"Product Goals": ["a", "b"], "Language": "**en**", "No": "", "N": 3}[/CONTENT]',
        "h4 Product Goals|ul(li(p a)|li(p b))|h4 Language|p(strong en)|h4 N|p 3",
    ),
    (
        '{"Task list": [["a.py", "main"]], "Chart": "graph TD\\nA-->B"}',
        "h4 Task list|ul(li(ul(li(p a.py)|li(p main))))|h4 Chart|figure(figcaption("
        "span Diagram (Mermaid)|button Copy)|div(pre 1\n2|pre graph TD\nA-->B))",
    ),
    ("{not json", "p {not json"),
    ("```\ncut", "figure(figcaption(span |button Copy)|div(pre 1|pre cut))"),
)
OUTLINE = """text => {
  const outline = each => [...each.children].map(child => {
    const name = child.tagName.toLowerCase();
    const mixed = [...child.childNodes].some(node => node.nodeType === 3 && node.data.trim());
    const isLeaf = mixed || child.children.length === 0;
    return isLeaf ? `${name} ${child.textContent}` : `${name}(${outline(child)})`;
  }).join("|");
  return outline(rendered(text));
}"""


def test_page_renders_documents_as_elements(tmp_path: Path, chromium: Any) -> None:
    """Markdown, MetaGPT's JSON, code, diagrams; what is hostile stays text and can be seen."""
    with live(burst(0), tmp_path) as client:
        chromium.goto(client.url)
        for text, outline in DOCUMENTS:
            assert chromium.evaluate(OUTLINE, text) == outline
        numbers = "rendered('a\\n'.repeat(3), 'py').querySelector('pre').textContent"
        assert chromium.evaluate(numbers) == "1\n2\n3\n4"
        for start in ("[", "`", "**a", "| ", "{", "- ", "[CONTENT]", "a\n"):
            hostile = (start * 50_000)[:100_000]
            assert chromium.evaluate("text => rendered(text).tagName", hostile) == "DIV"


CONTRAST = """() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", {willReadFrequently: true});
  const light = color => {
    canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1);
    const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map(
      value => value > 10.3 ? ((value / 255 + 0.055) / 1.055) ** 2.4 : value / 255 / 12.92);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05;
  };
  return Array.from({length: 24}, (_, index) => {
    const name = tint("role" + index, el("span.name", "x"));
    document.body.append(name);
    const [ink, back, card] = [getComputedStyle(name).color, ...["--back", "--card"].map(value => {
      name.style.color = `var(${value})`;
      return getComputedStyle(name).color;
    })].map(light);
    name.remove();
    return Math.min(...[back, card].map(paper => Math.max(ink, paper) / Math.min(ink, paper)));
  });
}"""


def test_page_has_role_colours_that_can_be_read(tmp_path: Path, chromium: Any) -> None:
    """24 roles on both backgrounds, light and dark: WCAG's 4.5 to 1."""
    with live(burst(0), tmp_path) as client:
        chromium.goto(client.url)
        for scheme in ("light", "dark"):
            chromium.emulate_media(color_scheme=scheme)
            contrasts = chromium.evaluate(CONTRAST)
            assert [round(each, 2) for each in contrasts if each < 4.5] == []


def axe_core() -> str:
    """The source of axe-core, which tries a page against WCAG."""
    return (node_modules() / "axe-core" / "axe.min.js").read_text()


def test_page_is_accessible_in_every_state(tmp_path: Path, chromium: Any) -> None:
    """axe-core finds nothing, light on a desk and dark on a phone."""
    source = axe_core()
    run = "async () => (await axe.run()).violations.map(each => [each.id, each.nodes[0].html])"

    def check() -> None:
        if not page.evaluate("'axe' in window"):
            page.evaluate(source)
        for scheme, width in (("light", 1280), ("dark", 390)):
            page.emulate_media(color_scheme=scheme)
            page.set_viewport_size({"width": width, "height": 900})
            assert page.evaluate(run) == []

    with watched_page(chromium, tmp_path) as (client, page, gate):
        team_event(page, "AGENT_START", "Architect", action="WriteDesign")
        for kind in ("TOKEN", "REASONING"):
            text = "# A\n\n```py\nx\n```\n\n|a|b|\n|-|-|\n|1|2|\n"
            team_event(page, kind, "Architect", message=text)
        team_event(page, "ERROR", "Architect", message="broken")
        team_event(page, "AGENT_START", "Engineer", action="WriteCode")
        team_event(page, "TOKEN", "Engineer", message="x = 1")
        team_event(page, "LOG", None, message="l")
        state = {"status": "RUNNING", "progress": 0.1, "cost": dict(streamer.NO_COST)}
        question = {"question_id": "q", "message": "m", "choices": None, "agent_role": None}
        receive(page, "state", **state, question=question, error_message="why")
        page.check("#log")
        page.wait_for_selector("#question:visible")
        check()  # running, with a question, a failure and the log
        page.uncheck("#log")
        check()  # with the story
        page.click("#more")
        page.wait_for_selector("#delete:visible")
        check()
        page.keyboard.press("Escape")
        page.click("#feed .doc button:has-text('Open')")
        check()
        page.keyboard.press("Escape")
        page.evaluate("setOffline(1000)")
        check()
        waiting = {**state, "status": "PENDING", "last_message": "waiting for a free slot"}
        receive(page, "state", **waiting)
        page.wait_for_selector("#status:has-text('queued')")
        check()
        team_event(page, "TASK_CANCELLED", None, message="cancelled by a client")
        receive(page, "state", **{**state, "status": "CANCELLED"})
        page.wait_for_selector("#feed .TASK_CANCELLED")
        check()
        gate.go.set()
        wait_until(lambda: client.get("/healthz")["tasks"] == {"SUCCEEDED": 1})
        page.reload()
        page.wait_for_selector("#feed .TASK_COMPLETE")
        check()
        page.goto(client.url)
        check()
        page.click("summary:has-text('Options')")
        page.wait_for_selector("#tasks .SUCCEEDED")
        check()
        page.evaluate("$('login').showModal()")
        check()


def test_page_keeps_its_token_to_itself(scripted: Client, chromium: Any) -> None:
    """A token in the page's address is taken out of it, and sent in a header."""
    page = chromium
    sent: list[Any] = []
    page.on(
        "request", lambda request: sent.append((request.url, request.headers.get("authorization")))
    )
    page.goto(f"{scripted.url}/?token=abc#")
    page.wait_for_selector("#mode:has-text('test')")
    assert "token" not in page.url
    assert (f"{scripted.url}/api/tasks?page_size=50&page=1", "Bearer abc") in sent
    nonces = set()
    for _ in range(2):
        answer = scripted.http.get("/")
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        (nonce,) = set(re.findall(r"'nonce-(\w+)'", policy))
        assert re.findall(r'<(\w+) nonce="(\w+)">', answer.text) == [
            ("style", nonce),
            ("script", nonce),
        ]
        nonces.add(nonce)
    assert len(nonces) == 2


# -----------------------------------------------------------------------------
# Embedding
# -----------------------------------------------------------------------------

MOUNTED = """
import logging, sys, uvicorn
from contextlib import AsyncExitStack, asynccontextmanager
from starlette.applications import Starlette
from streamer import Settings, create_app
logging.basicConfig(level=logging.INFO)
def made(name):
    settings = Settings(test_mode=True, workspace=name)
    return create_app(settings, runner=lambda run: run.emit("LOG", {"message": name}))
one, two = made("one"), made("two")
@asynccontextmanager
async def lifespan(app):
    async with AsyncExitStack() as stack:
        for each in (one, two):
            await stack.enter_async_context(each.router.lifespan_context(each))
        yield
if sys.argv[1] == "fastapi":
    from fastapi import FastAPI
    app = FastAPI(lifespan=lifespan)
else:
    app = Starlette(lifespan=lifespan)
app.mount("/agents/one", one)
app.mount("/agents/two", two)
class Server(uvicorn.Server):
    def _log_started_message(self, listeners):
        logging.info("it is at http://127.0.0.1:%d", listeners[0].getsockname()[1])
Server(uvicorn.Config(app, port=0, log_config=None)).run()
"""


@pytest.mark.parametrize("framework", ["starlette", "fastapi"])
def test_mounted_under_a_prefix(tmp_path: Path, framework: str) -> None:
    """Two of them in an application, with its lifespan: each has its tasks, links the prefix."""
    needs_package(framework)
    with process("-c", MOUNTED, framework, cwd=tmp_path) as server:
        for name, count in (("one", 1), ("two", 0)):
            client = Client(f"{server.client.url}/agents/{name}")
            assert client.get("/api/tasks")["total"] == 0
            assert client.http.get("/").headers["content-type"].startswith("text/html")
            for _ in range(count):
                created = client.http.post("/api/tasks", json={"input_prompt": "p"})
                assert (
                    created.headers["location"]
                    == f"/agents/{name}/api/tasks/{created.json()['id']}"
                )
                assert client.watch(created.json()["id"]).last_state["status"] == "SUCCEEDED"
            assert client.get("/healthz")["tasks"] == ({"SUCCEEDED": 1} if count else {})
            client.http.close()
        assert server.stop() == -signal.SIGTERM


def test_uvicorn_factory_serves_it(tmp_path: Path) -> None:
    """`uvicorn --factory streamer:create_app`, settings from the environment."""
    command = ["-m", "uvicorn", "--factory", "streamer:create_app", "--port", "0"]
    with process(*command, cwd=tmp_path, environ={"STREAMER_TEST_MODE": "1"}) as server:
        assert server.says("Uvicorn running on "), server.errors
        found = re.search(r"http://\S+", "".join(server.errors))
        assert found is not None
        client = Client(found[0])
        with client.socket(client.create()) as websocket:
            receive_until(websocket, is_event("TASK_START"))
        client.http.close()


TWO_PROCESSES = ["-m", "uvicorn", "--factory", "streamer:create_app"]
TWO_PROCESSES += ["--port", "0", "--workers", "2"]


@pytest.mark.parametrize(
    ("variable", "reason"),
    [
        (
            "STREAMER_X",
            "each of several processes (--workers) would have tasks of its own in memory",
        ),
        ("STREAMER_DB", "another streamer uses it; give each its own file, or all of them one"),
    ],
)
def test_second_process_is_told_and_ends_all(tmp_path: Path, variable: str, reason: str) -> None:
    """`uvicorn --workers 2` stops with the reason, and does not start its processes again."""
    environ = {"STREAMER_TEST_MODE": "1", variable: "tasks.db"}
    with process(*TWO_PROCESSES, cwd=tmp_path, environ=environ) as server:
        assert server.wait() == 0  # uvicorn has it so
    text = "".join(server.errors)
    assert text.count(reason) == 1
    assert text.count(", stopping the parent process.") == 1


def test_processes_that_share_redis_are_one_service(
    tmp_path: Path, redis_server: RedisServer
) -> None:
    """Both of `uvicorn --workers 2` know every task."""
    environ = {"STREAMER_TEST_MODE": "1", "STREAMER_REDIS_URL": redis_server.url + "/11"}
    with process(*TWO_PROCESSES, cwd=tmp_path, environ=environ) as server:
        ready = "Application startup complete."
        wait_until(lambda: "".join(server.errors).count(ready) == 2)
        url = re.findall(r"http://\S+", "".join(server.errors))[0]
        ids = set()
        for _ in range(20):  # each over a connection of its own, to either of them
            client = Client(url)
            with client.http:
                ids.add(client.create())
                assert {client.get(f"/api/tasks/{task_id}")["id"] for task_id in ids} == ids
        assert server.stop() == 0


# -----------------------------------------------------------------------------
# Application
# -----------------------------------------------------------------------------


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_stop_the_run_tell_the_clients_and_exit(
    tmp_path: Path, how: signal.Signals
) -> None:
    """Ten clients of a running task get its events and TASK_CANCELLED, one of an idle task 1001."""
    with process(SERVER, "--test-mode", "--port", "0", cwd=tmp_path) as server:
        client = server.client
        task_id = client.create()
        idle_id = client.create()
        with contextlib.ExitStack() as stack, client.socket(idle_id, "start=false") as idle:
            watchers = [stack.enter_context(client.socket(task_id)) for _ in range(10)]
            for websocket in watchers:
                receive_until(websocket, is_event("TOKEN"))
            receive_until(idle, lambda message: message["type"] == "state")
            server.popen.send_signal(how)
            records = [watched(websocket) for websocket in watchers]
            idle_record = watched(idle)
        code = server.wait()
    for record in records:
        assert record.events[-1]["event_type"] == "TASK_CANCELLED"
        assert record.ids == list(range(record.ids[0], record.ids[-1] + 1))
        assert (record.last_state["status"], record.close_code) == ("CANCELLED", 1000)
    assert idle_record.messages[-1]["data"]["code"] == "server_closing"
    assert idle_record.close_code == 1001
    assert code == (0 if how is signal.SIGINT else -signal.SIGTERM)
    assert "Traceback" not in "".join(server.errors)


IGNORING_HANGUPS = """
import signal, sys, streamer
signal.signal(signal.SIGHUP, signal.SIG_IGN)
sys.exit(streamer.main())
"""


def test_shutdown_cuts_off_half_a_request(tmp_path: Path) -> None:
    """Without a word in the log; and behind nohup a SIGHUP is no reason to shut down."""
    command = ["-c", IGNORING_HANGUPS, "--test-mode", "--port", "0", "--grace", "1"]
    with process(*command, cwd=tmp_path) as server:
        server.client.create()
        head = b"POST /api/tasks HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 99\r\n"
        head += b"Content-Type: application/json\r\nExpect: 100-continue\r\n\r\n"
        with raw_request(server.client, head) as sock:
            read_until(sock, b"100 Continue")
            server.popen.send_signal(signal.SIGHUP)
            server.client.create()
            assert server.stop() == -signal.SIGTERM
            assert read_to_end(sock) == b""
    lines = [line for line in server.errors if " INFO streamer " not in line]
    assert len(lines) == 1  # its address


# A server whose team logs 1.3 MB at once.
TALKATIVE = """
import sys, streamer
def runner(run):
    for _ in range(1300):
        streamer.logger.info("x" * 1000)
streamer.run_scripted = runner
sys.exit(streamer.main())
"""


@pytest.mark.parametrize("read", [True, False])
def test_log_that_nobody_reads_holds_up_nothing(tmp_path: Path, read: bool) -> None:
    """Neither a task nor the end; whoever reads it later is told how much was dropped."""
    command = [sys.executable, "-c", TALKATIVE, "--test-mode", "--port", "0"]
    environ = {**os.environ, "PYTHONPATH": str(HERE)}
    with contextlib.ExitStack() as stack:
        server = subprocess.Popen(
            command, cwd=tmp_path, env=environ, stderr=subprocess.PIPE, bufsize=0
        )
        stack.enter_context(server)
        stack.callback(server.kill)
        assert server.stderr is not None
        address = server.stderr.readline().decode()
        client = Client(re.findall(r"http://\S+:\d+", address)[0])
        received = b""
        with client.http:
            assert client.watch(client.create()).last_state["status"] == "SUCCEEDED"
            while read and len(received) < 70_000:  # more than a pipe holds
                received += server.stderr.read(65536)
            last = client.create()
        server.send_signal(signal.SIGINT)
        if not read:
            assert server.wait(TIMEOUT) == 0
        received += server.stderr.read()
        assert server.wait(TIMEOUT) == 0
    lines = received.decode().splitlines()
    note = re.compile(r"(\d+) lines of the log were dropped: nobody read them")
    dropped = [int(found[1]) for found in map(note.fullmatch, lines) if found]
    if not read:
        assert dropped == []
        return
    # Of the first task: PENDING, RUNNING, 1300, its client, SUCCEEDED; of the second: PENDING.
    assert sum(dropped) > 100  # a short one may fit where a long one did not
    assert len(lines) - len(dropped) + sum(dropped) == 1305
    assert sum(f"task id={last} status=PENDING" in line for line in lines) == 1


def test_serve_returns_to_an_embedder_whose_thread_does_not_stop(tmp_path: Path) -> None:
    """What becomes of the process then is the embedder's to say."""
    code = """
import os, threading, streamer
settings = streamer.Settings(port=0, test_mode=True, grace=0.5)
streamer.logging.basicConfig(level="INFO")
def runner(run):
    run.emit("LOG")
    threading.Event().wait()
streamer.serve(streamer.create_app(settings, runner=runner), settings)
os._exit(7)
"""
    with process("-c", code, cwd=tmp_path) as server:
        watcher = server.client.follow(server.client.create())
        watcher.sees(2)
        assert server.stop(signal.SIGINT) == 7
        assert watcher.join()[-1]["event_type"] == "TASK_CANCELLED"


def test_signal_ends_a_process_whose_thread_does_not_stop(tmp_path: Path) -> None:
    """A runner that ignores its cancel keeps the process no longer than `grace`."""
    code = """
import threading, streamer
settings = streamer.Settings(port=0, test_mode=True, grace=1.0)
streamer.logging.basicConfig(level="INFO")
def runner(run):
    run.emit("LOG")
    threading.Event().wait()
streamer.serve(streamer.create_app(settings, runner=runner), settings)
"""
    with process("-c", code, cwd=tmp_path) as server:
        with server.client.socket(server.client.create()) as websocket:
            receive_until(websocket, is_event("LOG"))
            server.popen.send_signal(signal.SIGTERM)
            record = watched(websocket)
        assert "was abandoned" in record.events[-1]["payload"]["message"]
        assert server.wait() == -signal.SIGTERM
        assert "Traceback" not in "".join(server.errors)


def test_run_shows_a_task_in_the_terminal(tmp_path: Path) -> None:
    """`streamer.py run` prints agents, tokens, progress and files, and exits 0."""
    arguments = ["-c", QUICK, "run", "Build a todo app", "--test-mode"]
    with process(*arguments, cwd=tmp_path, environ={"STREAMER_PROT": "1"}) as command:
        assert command.wait() == 0
        text = command.output.decode()
        for part in (
            "ProductManager starts WritePRD\n",
            "# Requirements\n",
            "20%, ",
            streamer.CODE,  # whole: how far it is, is said between the roles
            "done: 5 files, 5 rounds\n",
            "files: ",
        ):
            assert part in text
        assert command.errors == ["STREAMER_PROT is unknown (did you mean STREAMER_PORT?)\n"]


@pytest.mark.parametrize(
    ("typed", "code", "parts"),
    [
        (
            "\nblue\ncontinue\n",
            0,
            ["not only blanks; it has 0", "answered: blue", "# As a person remarked: blue"],
        ),
        ("stop", 1, ["standard input has ended: nobody can answer", "\ncancelled by a client\n"]),
    ],
)
def test_run_asks_in_the_terminal(tmp_path: Path, typed: str, code: int, parts: list[str]) -> None:
    """A line of standard input is the answer; without one nobody can answer, and that is said."""
    command = ["-c", QUICK, "run", "Build", "--test-mode", "--approve", "WritePRD, WriteDesign"]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *command],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(HERE)},
        input=typed,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (code, "")
    assert "\nanswer (continue, stop, any text):\n" in done.stdout
    assert [part for part in parts if part not in done.stdout] == []


def test_run_asks_on_a_terminal(tmp_path: Path) -> None:
    """The display makes room for what is typed, and goes on after it."""
    command = ("-c", QUICK, "run", "Build", "--test-mode", "--approve", "WritePRD")
    code, text = on_terminal(tmp_path, *command, typed={"answer (continue, stop": b"continue\n"})
    assert code == 0
    asked = text.index("answer (continue, stop, any text):")
    assert "━" not in text[asked : text.index("continue\r\n", asked)]
    assert "100%" in text[asked:]


def on_terminal(
    folder: Path, *command: str, typed: Mapping[str, bytes] = types.MappingProxyType({})
) -> tuple[int, str]:
    """The exit code of `python …` on a terminal of 80 columns, and all that it wrote there.

    `typed`: what is typed once a text was written.
    """
    left = dict(typed)
    ours, theirs = os.openpty()
    os.set_inheritable(theirs, True)
    environ = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "80", "PYTHONWARNINGS": "ignore"}
    environ["PYTHONPATH"] = str(HERE)
    popen = subprocess.Popen(
        [sys.executable, *command],
        cwd=folder,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environ,
    )
    os.close(theirs)
    output = b""
    with contextlib.suppress(OSError):  # Linux says so when the other end is closed
        while data := os.read(ours, 65536):
            output += data
            for text in [text for text in left if text in output.decode(errors="replace")]:
                os.write(ours, left.pop(text))
    os.close(ours)
    return popen.wait(TIMEOUT), output.decode()


def test_run_shows_colours_and_a_last_line_on_a_terminal(tmp_path: Path) -> None:
    """Roles in colours, how far, who is at work, the files; no escape of the prompt's."""
    code, text = on_terminal(tmp_path, "-c", QUICK, "run", "Build \x1b[31m one", "--test-mode")
    assert code == 0
    for part in (
        "Build �[31m one (test mode: a scripted team)\r\n",
        "\x1b[1;35mProductManager\x1b[0m starts WritePRD\r\n",
        "# Requirements",
        "\x1b[2m20%, Architect, ",
        "\x1b[1;32mdone: 5 files, 5 rounds\x1b[0m\r\n",
        "src/app.py\r\n",
    ):
        assert part in text, part
    assert "\x1b[31m" not in text
    assert text.endswith(f"{next(tmp_path.glob('workspace/*'))}\r\n")


OPEN_LINE = """
import sys, threading, streamer
shown, show = threading.Event(), streamer.Transcript.show
def watched(transcript, message):
    show(transcript, message)
    if "the beginning" in str(message):
        shown.set()
streamer.Transcript.show = watched
def runner(run):
    cost = {"total_cost": None, "prompt_tokens": 1200, "max_budget": 3.0}
    run.emit("REASONING", {"message": "let me think", "call_id": "c"}, "Architect")
    run.emit("TOKEN", {"message": "the beginning", "call_id": "c"}, "Architect")
    while not shown.is_set():
        run.wait(0.01)
    run.emit("TOKEN", {"message": ", the end\\n", "call_id": "c"}, "Architect")
    run.update(cost=cost, progress=0.5)
streamer.run_scripted = runner
sys.exit(streamer.main())
"""


def test_run_shows_the_line_that_is_being_written(tmp_path: Path) -> None:
    """What a model says runs on as it comes; thinking is set apart; a price may be unknown."""
    code, text = on_terminal(tmp_path, "-c", OPEN_LINE, "run", "Build", "--test-mode")
    assert code == 0
    assert "\x1b[2;3mlet me think\x1b[0m\r\nthe beginning, the end\r\n" in text
    assert "\x1b[2m50%, 1,200 tokens, price unknown\x1b[0m" in text


def shown_event(kind: str, role: str | None, message: str, **payload: Any) -> dict[str, Any]:
    payload["message"] = message
    data = {"event_type": kind, "agent_role": role, "payload": payload}
    return {"type": "event", "data": data}


def shown_state(status: str = "RUNNING", **values: Any) -> dict[str, Any]:
    state = streamer.TaskState(task_id="t", status=TaskStatus(status), **values)
    return {"type": "state", "data": state.as_dict()}


def transcript_of(*messages: dict[str, Any], output: type[io.StringIO] = io.StringIO) -> list[str]:
    """The lines it prints, without what wipes the last one."""
    with contextlib.redirect_stdout(output()) as printed:
        transcript = streamer.Transcript()
        for message in messages:
            transcript.show(message)
    return printed.getvalue().replace("\r\x1b[K", "").splitlines()


def test_transcript_leaves_thinking_out() -> None:
    """In plain lines nothing would tell it from what the model answers."""
    assert transcript_of(
        shown_event("TOKEN", "Engineer", "a", call_id="c"),
        shown_event("REASONING", "Engineer", "hm", call_id="c"),
        shown_event("TOKEN", "Engineer", "b\n", call_id="c"),
    ) == ["Engineer", "ab"]


OVERLAP = (
    shown_event("AGENT_START", "Architect", "Architect starts WriteDesign", action="WriteDesign"),
    shown_event("TOKEN", "Architect", "one, ", action="WriteDesign", call_id="a"),
    shown_event("AGENT_START", "Engineer", "Engineer starts WriteCode", action="WriteCode"),
    shown_event("TOKEN", "Engineer", "x = 1\n", action="WriteCode", call_id="b"),
    shown_event("TOKEN", "Architect", "two", action="WriteDesign", call_id="a"),
    shown_event("AGENT_COMPLETE", "Architect", "Architect finished WriteDesign"),
    shown_event("TOKEN", "Engineer", "LGTM\n", action="WriteCodeReview", call_id="c"),
    shown_event("TASK_COMPLETE", None, "2 files"),
)


def test_transcript_shows_overlapping_roles_one_after_the_other() -> None:
    """No sentence is torn, and each text stands below whose it is."""
    assert transcript_of(*OVERLAP) == [
        "Architect starts WriteDesign",
        "one, two",
        "Architect finished WriteDesign",
        "Engineer starts WriteCode",
        "x = 1",
        "Engineer WriteCodeReview",
        "LGTM",
        "done: 2 files",
    ]


def test_transcript_does_not_wait_for_a_silent_role(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that never says that it is done holds nobody up."""
    monkeypatch.setattr(streamer.Transcript, "PATIENCE", -1.0)
    assert transcript_of(*OVERLAP) == [
        "Architect starts WriteDesign",
        "one, ",
        "Engineer starts WriteCode",
        "x = 1",
        "Architect WriteDesign",
        "two",
        "Architect finished WriteDesign",
        "Engineer WriteCodeReview",
        "LGTM",
        "done: 2 files",
    ]


def test_transcript_says_in_a_pipe_what_a_person_must_know() -> None:
    """Loading, progress, warnings, failure, end; not what MetaGPT logs or others have said."""
    cost = {**streamer.NO_COST, "prompt_tokens": 1000, "total_cost": 0.0125, "max_budget": 3.0}
    assert transcript_of(
        {"type": "connected", "data": {"message": "watching 'Build'"}},
        shown_state("PENDING"),
        shown_state("PENDING", last_message="loading MetaGPT"),
        shown_state("PENDING", last_message="loading MetaGPT"),
        shown_event("TASK_START", None, "Build", mode="metagpt"),
        shown_event("MESSAGE", None, "Human to <all>: Build", sent_from="Human"),
        shown_event("LOG", "Engineer", "to do WriteCode", level="INFO"),
        shown_event("LOG", "Engineer", "asked again", level="WARNING"),
        shown_state(progress=0.2, cost=cost),
        shown_state(progress=0.201, cost=cost, error_message="the store is away"),
        shown_event("ERROR", "Engineer", "Engineer failed: no key"),
        shown_event("TASK_ERROR", None, "Engineer failed: no key"),
        shown_state("FAILED", progress=0.3, error_message="Engineer failed: no key"),
        shown_event("RESULT", None, "2 files"),
        shown_event("TASK_CANCELLED", None, "cancelled by a client"),
        {"type": "error", "data": {"message": "task t not found"}},
    ) == [
        "watching 'Build'",
        "loading MetaGPT",
        "Build",
        "Engineer: asked again",
        "20%, 1,000 tokens, $0.0125 of $3.00",
        "the store is away",
        "Engineer failed: no key",
        "failed: Engineer failed: no key",
        "cancelled by a client",
        "task t not found",
    ]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_transcript_tells_a_failure_once_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """In red, where it happened; the end points to it."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert transcript_of(
        shown_event("ERROR", "Engineer", "Engineer failed: no key"),
        shown_event("TASK_ERROR", None, "Engineer failed: no key"),
        output=Terminal,
    ) == [
        "\x1b[1;35mEngineer\x1b[0m\x1b[31m failed: no key\x1b[0m",
        "\x1b[1;31mfailed: see above\x1b[0m",
    ]


@pytest.mark.parametrize(
    ("columns", "lines", "status"),
    [
        (
            40,
            ["Engineer: asked again, because the", "  server was busy for a minute"],
            "45%, Engineer, silent for 12 s, 1,000 t",
        ),
        (
            80,
            ["Engineer: asked again, because the server was busy for a minute"],
            "45%, Engineer, silent for 12 s, 1,000 tokens, $0.0125 of $3.00",
        ),
    ],
)
def test_transcript_fits_the_terminal(
    monkeypatch: pytest.MonkeyPatch, columns: int, lines: list[str], status: str
) -> None:
    """Lines break between words; a path stays whole; the last line is cut. NO_COLOR is heeded."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("NO_COLOR", "1")
    path = "/" + "long" * 30
    cost = {**streamer.NO_COST, "prompt_tokens": 1000, "total_cost": 0.0125, "max_budget": 3.0}
    assert transcript_of(
        shown_event("AGENT_START", "Engineer", "Engineer starts"),
        shown_event("LOG", "Engineer", "asked again, because the server was busy for a minute"),
        shown_event("LOG", "Engineer", path),
        shown_state(progress=0.45, cost=cost, waiting=("Engineer", None, time.time() - 12)),
        output=Terminal,
    ) == [
        "Engineer starts",
        *lines,
        "Engineer:",
        f"  {path}",
        f"\x1b[?7l{status}\x1b[?7h",
    ]


def test_transcript_leaves_room_for_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """No last line is drawn over what a person types."""
    monkeypatch.setenv("TERM", "xterm")
    state = shown_state()
    state["data"]["question"] = {"question_id": "q"}
    assert transcript_of(state, output=Terminal) == []


def test_run_as_json_is_for_other_programs(tmp_path: Path) -> None:
    with process("-c", QUICK, "run", "Build", "--test-mode", "--json", cwd=tmp_path) as command:
        assert command.wait() == 0
        messages = [json.loads(line) for line in command.output.splitlines()]
    assert messages[0]["type"] == "state"
    assert [message["data"]["event_type"] for message in messages if message["type"] == "event"][
        -1
    ] == "TASK_COMPLETE"
    assert messages[-1]["data"]["status"] == "SUCCEEDED"


@pytest.mark.parametrize(
    ("into", "shown", "said"),
    [
        ("| head -1", "Build ?? (test mode: a scripted team)\n", ""),
        ("> /dev/full", "", "the output cannot be written: [Errno 28] No space left on device\n"),
        ("> /dev/full 2>&1", "", ""),
        (">&- 2>&- <&-", "", ""),
    ],
)
def test_run_goes_on_where_its_output_ends(
    tmp_path: Path, into: str, shown: str, said: str
) -> None:
    """In any locale; it ends as its task does, and a pipe that is closed is no fault."""
    command = shlex.join([sys.executable, "-W", "ignore", "-c", QUICK, "run", "Build 日本"])
    environ = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(HERE)}
    for options, code in (("--test-mode", 0), ("--test-mode --task-timeout 0.1", 1)):
        script = f"{command} {options} {into}; exit ${{PIPESTATUS[0]}}"
        done = subprocess.run(
            ["bash", "-c", script], cwd=tmp_path, env=environ, capture_output=True, text=True
        )
        assert (done.returncode, done.stdout, done.stderr) == (code, shown, said)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_run_that_is_interrupted_says_so(tmp_path: Path, how: signal.Signals) -> None:
    """Ctrl-C, like the other signals, cancels the run and exits 130 without a traceback."""
    with process(SERVER, "run", "Build", "--test-mode", cwd=tmp_path) as command:
        wait_until(lambda: bool(list(tmp_path.glob("workspace/*/docs/prd.md"))))
        assert command.stop(how) == 130
    assert command.errors == []
    lines = command.output.decode().splitlines()
    answered = lines.index("interrupted: cancelling the run")
    assert lines[answered + 1 :].count("cancelled by a client") == 1
    assert lines[-1] == f"files: {next(tmp_path.glob('workspace/*'))}"


def test_run_that_fails_says_so(tmp_path: Path) -> None:
    """It exits 1, with its reason on the screen."""
    with process(
        SERVER, "run", "Build", "--test-mode", "--task-timeout", "0.2", cwd=tmp_path
    ) as command:
        assert command.wait() == 1
        assert b"timed out after 0.2 s" in command.output


OPTIONS_RUNNER = """
import json, sys, streamer
streamer.run_scripted = lambda run: {"prompt": run.prompt, "options": dict(run.options)}
sys.exit(streamer.main())
"""


@pytest.mark.parametrize(
    ("arguments", "prompt", "options"),
    [
        (["run", "--test-mode", "Build a todo app"], "Build a todo app", {}),
        (
            ["--test-mode", "run", "-", "--no-code-review"],
            "from standard\ninput",
            {"code_review": False},
        ),
        (
            ["run", "--n-round", "3", "Build", "--test-mode=yes", "--investment=1"],
            "Build",
            {"n_round": 3, "investment": 1},
        ),
        (
            ["run", "- a list", "--test-mode", "--project-name", "x", "--run-tests"],
            "- a list",
            {"project_name": "x", "run_tests": True},
        ),
        (["run", "--test-mode", "--no-test-mode", "--test-mode", "--", "--json"], "--json", {}),
    ],
)
def test_run_takes_flags_anywhere_and_the_options_of_a_task(
    tmp_path: Path, arguments: list[str], prompt: str, options: dict[str, Any]
) -> None:
    """Before the prompt or behind it; what is not given has the default of an option."""
    command = [sys.executable, "-W", "ignore", "-c", OPTIONS_RUNNER, "--json", *arguments]
    environ = {**os.environ, "PYTHONPATH": str(HERE)}
    text = "from standard\ninput\n"
    done = subprocess.run(
        command, cwd=tmp_path, env=environ, input=text, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    result = json.loads(done.stdout.splitlines()[-1])["data"]["final_result"]
    defaults = {name: option.default for name, option in streamer.OPTIONS.items()}
    assert result == {"prompt": prompt, "options": {**defaults, "timeout": 3600.0, **options}}


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "no model is configured. Set OPENAI_API_KEY"),
        (["--port", "http"], "--port must be a whole number, not 'http'"),
        (["--port"], "argument --port: expected one argument; see --help"),
        (
            ["--host", "0.0.0.0", "--test-mode"],
            "can be reached from other machines, so a token is needed",
        ),
        (
            ["--workspace", "/dev/null/x"],
            "workspace '/dev/null/x' is a file, or below one, and must be a folder",
        ),
        (["run", "--test-mode"], "run takes one prompt, not 0: run 'Build a todo app'"),
        (["run", "Build", "an", "app"], "run takes one prompt, not 3: run 'Build an app'"),
        (["serve", "it"], "serve takes no 'it'; flags begin with --"),
        (["run", " ", "--test-mode"], "prompt must be 1 to 32000 characters"),
        (
            ["run", "-", "--test-mode"],
            "prompt must be 1 to 32000 characters, not only blanks; it has 0",
        ),
        (
            ["Build an app"],
            "'Build an app' is no command; the commands are serve (the default) and run",
        ),
        (["--prot", "80"], "--prot is unknown (did you mean --port?); see --help"),
        (
            ["run", "p", "--n-rounds=3"],
            "--n-rounds is unknown (did you mean --n-round?); see --help",
        ),
        (
            ["run", "p", "--n-round", "99"],
            "--n-round must be a whole number from 1 to 50, not the number 99",
        ),
        (
            ["run", "p", "--code-review=maybe"],
            '--code-review must be true or false, not the string "maybe"',
        ),
        (
            ["run", "p", "--timeout", "3601"],
            "--timeout must be at most 3600 s, the server's task_timeout",
        ),
        (["--n-round", "3"], "--n-round is for a task: use it with run, or POST it"),
    ],
)
def test_wrong_usage_exits_2_and_says_what_to_do(
    tmp_path: Path, arguments: list[str], complaint: str
) -> None:
    """One line, no traceback; it never falls back to the scripted team by itself."""
    command = [sys.executable, SERVER, *arguments]
    clean = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    done = subprocess.run(
        command, cwd=tmp_path, env=clean, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("streamer: ")
    assert complaint in done.stderr
    assert "Traceback" not in done.stderr


def test_serve_says_where_it_is_and_that_a_port_is_in_use(tmp_path: Path) -> None:
    """The address a person can open, above the log; the port that is taken, with what to do."""
    with loopback() as taken:
        taken.listen()
        port = str(taken.getsockname()[1])
        with process(SERVER, "--test-mode", "--port", port, cwd=tmp_path) as server:
            assert server.wait() == 2
        complaint = f"cannot listen on port {port} of 127.0.0.1: it is in use; "
        complaint += "port 0 (--port 0) takes a free one"
        assert server.errors == [f"streamer: {complaint}\n"]
    for host, token in (("0.0.0.0", "/?token=…"), ("127.0.0.1", ""), ("localhost", "")):
        environ = {"STREAMER_TOKEN": TOKEN if token else ""}
        command = ["--test-mode", "--port", "0", "--host", host]
        with process(SERVER, *command, cwd=tmp_path, environ=environ) as server:
            port = server.client.url.rpartition(":")[2]
            line = f"streamer is at http://127.0.0.1:{port}{token} in test mode, "
            line += "a scripted team; Ctrl-C stops it\n"
            assert server.errors[0] == line


def test_version_is_one_line(tmp_path: Path) -> None:
    with process(SERVER, "--version", cwd=tmp_path) as command:
        assert command.wait() == 0
    assert command.output.decode() == f"streamer {streamer.__version__}\n"


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ("llm: [", "config2.yaml cannot be read"),
        ("llm: 7", "must hold a mapping"),
        ("llm:\n  api_key: YOUR_API_KEY", "no model is configured"),
        ("llm:\n  api_type: ollama\n  model: m", "llm.base_url in "),
        (
            "llm:\n  api_type: gemini\n  api_key: abc\n  model: m",
            "needs a package: pip install 'google-generativeai'",
        ),
    ],
)
def test_wrong_metagpt_configuration_exits_2(tmp_path: Path, config: str, complaint: str) -> None:
    """A config2.yaml that cannot work is an error at start, naming what is wrong."""
    (tmp_path / ".metagpt").mkdir()
    (tmp_path / ".metagpt" / "config2.yaml").write_text(config)
    with process(SERVER, "--port", "0", cwd=tmp_path) as command:
        assert command.wait() == 2
        assert complaint in "".join(command.errors)


def test_help_fits_a_screen_and_has_examples(tmp_path: Path) -> None:
    """--help names every setting, in groups, and every task option, in 45 lines of 100 columns."""
    with process(SERVER, "--help", cwd=tmp_path) as command:
        assert command.wait() == 0
        text = command.output.decode()
    assert len(text.splitlines()) <= 45
    assert max(map(len, text.splitlines())) <= 100
    settings, others = text.split("\nRun ")
    assert set(re.findall(r"^.{9}--([a-z-]+)", settings, re.MULTILINE)) == {
        name.replace("_", "-") for name in Settings.__dataclass_fields__
    }
    for name in streamer.OPTIONS:
        assert f"-{name.replace('_', '-')}" in others
    assert re.findall(r"^(\w+) +--", settings, re.MULTILINE)[:3] == ["Serving", "Models", "Access"]
    assert "examples:" in others


def test_watcher_exits_by_the_outcome(tmp_path: Path) -> None:
    """The watcher exits 0 for SUCCEEDED, 1 for another end, 2 for no such task or server."""
    watcher = str(HERE / "test_streamer.py")

    def runner(run: Run) -> None:
        run.emit("TOKEN", {"message": "hello", "call_id": "c"}, "Engineer")
        if "fail" in run.prompt:
            raise RuntimeError("as asked")

    with live(runner, tmp_path) as client:
        for prompt, code in (("succeed", 0), ("fail", 1)):
            with process(
                watcher, client.create(prompt), "--url", client.url, cwd=tmp_path
            ) as command:
                assert command.wait() == code
                assert "hello" in command.output.decode()
        with process(watcher, "nope", "--url", client.url, cwd=tmp_path) as command:
            assert command.wait() == 2
            assert "not found" in command.output.decode()
    with live(two_questions, tmp_path) as client:
        done = subprocess.run(
            [sys.executable, watcher, client.create(), "--url", client.url],
            input="green\nred\nso it is\n",
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert "answer must be one of red, blue, not 'green'" in done.stdout
        assert done.stdout.endswith("\ndone: done\n")
    with process(watcher, "nope", "--url", client.url, cwd=tmp_path) as command:
        assert command.wait() == 2
        assert "cannot connect" in "".join(command.errors)


# -----------------------------------------------------------------------------
# The README
# -----------------------------------------------------------------------------


def readme_blocks(heading: str = "") -> list[str]:
    """The commands of one section of the README, or of all."""
    text = (HERE / "README.md").read_text()
    if heading:
        text = text.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    return re.findall(r"```bash\n(.*?)```", text, re.DOTALL)


def test_readme_commands_can_be_pasted() -> None:
    """No comments, which zsh has none of at its prompt; what reads the terminal ends its block."""
    blocks = readme_blocks()
    assert blocks != []
    for block in blocks:
        lines = block.splitlines()
        assert [line for line in lines if re.search("(^|\\s)#", line)] == []
        assert [line for line in lines[:-1] if re.search("^wscat|streamer.py", line)] == []


def paste_into_bash(lines: str, **how: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", "-ec", lines], capture_output=True, text=True, **how)


def paste_into_zsh(lines: str, stdin: int, **how: Any) -> subprocess.CompletedProcess[str]:
    """As at its prompt, without anybody's configuration; wscat gets the person's terminal."""
    lines = f"set -e\nwscat() {{ command wscat $@ <&{stdin} }}\n{lines}"
    command = [needs("zsh"), "-f", "-i", "-s"]
    return subprocess.run(
        command, input=lines, pass_fds=[stdin], capture_output=True, text=True, **how
    )


@pytest.mark.parametrize("paste", [paste_into_bash, paste_into_zsh])
def test_readme_lines_work_as_written(
    scripted: Client, tmp_path: Path, paste: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """The curl and wscat lines of "By hand", one by one; only the port differs."""
    needs("curl")
    needs("wscat")
    blocks = [block for block in readme_blocks("By hand") if ".venv" not in block]
    lines = "".join(blocks).replace(":8000", f":{scripted.url.rsplit(':', 1)[1]}")
    readable, writable = os.pipe()  # a person's terminal: an input that stays open and says nothing
    try:
        done = paste(lines, stdin=readable, cwd=tmp_path)
    finally:
        os.close(readable)
        os.close(writable)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    for part in (
        '"type":"connected"',
        '"event_type":"TASK_COMPLETE"',
        '"event_type":"TASK_CANCELLED"',
        '"path":"src/app.py"',
    ):
        assert part in done.stdout, part
    assert '"recovered":false' not in done.stdout  # the log has the event that is resumed after
    assert re.search(r'\nid: \d+\ndata: {"type":"event".*"event_type":"ARTIFACT"', done.stdout)
    tasks = scripted.get("/api/tasks")["items"]
    assert [task["status"] for task in tasks[:2]] == ["SUCCEEDED", "SUCCEEDED"]


def test_readme_configurations_are_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of MetaGPT's configurations passes the checks of the start; its values are text."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".metagpt").mkdir()
    examples = readme_example("yaml", "llm:").splitlines()
    vendors = []
    for example in examples:
        (tmp_path / ".metagpt" / "config2.yaml").write_text(example.replace("…", "0123456789"))
        llm = streamer.model_config({})["llm"]
        assert [value for value in llm.values() if not isinstance(value, str)] == []
        vendors.append(llm.get("api_type", "openai"))
    assert vendors == ["openai", "azure", "anthropic", "ollama", "openai", "openai"]


def test_readme_nginx_example_serves_two_replicas(
    tmp_path: Path, redis_server: RedisServer
) -> None:
    """By the README's `location`: HTTP, WebSocket, SSE, a replica killed."""
    nginx = needs("nginx")
    location = readme_example("nginx", "location")
    with replicas(2, redis_server, tmp_path) as servers, loopback() as free:
        port = str(free.getsockname()[1])
        names = [server.client.url.removeprefix("http://") for server in servers]
        upstream = f"upstream streamer {{ server {names[0]}; server {names[1]}; }}"
        site = f"server {{ listen 127.0.0.1:{port}; {location} }}"
        config = f"events {{}} http {{ access_log off; {upstream} {site} }}"
        (tmp_path / "nginx.conf").write_text(config)
        free.close()
        command = [
            nginx,
            "-p",
            str(tmp_path),
            "-e",
            "stderr",
            "-c",
            "nginx.conf",
            "-g",
            "pid nginx.pid;",
        ]
        subprocess.run(
            command, check=True, stderr=subprocess.DEVNULL
        )  # it listens when this returns
        client = Client(f"http://127.0.0.1:{port}")
        try:
            task_id = client.create("0.001")
            witnesses = [client.follow(task_id) for _ in range(4)]
            for witness in witnesses:
                witness.sees()
            accept = {"Accept": "text/event-stream"}
            with client.http.stream(
                "GET", f"/api/tasks/{task_id}/events", headers=accept
            ) as response:
                assert "connected" in next(response.iter_lines())
            assert client.post(f"/api/tasks/{task_id}/cancel").status_code == 202
            logs = [witness.join() for witness in witnesses]
            assert logs == [whole_log(client, task_id)] * 4
            servers[0].stop(signal.SIGKILL)
            assert [client.get(f"/api/tasks/{task_id}")["status"] for _ in range(4)] == [
                "CANCELLED"
            ] * 4
        finally:
            subprocess.run([*command, "-s", "stop"], check=True, stderr=subprocess.DEVNULL)
            client.http.close()


def readme_example(language: str, part: str) -> str:
    """The README's one block in a language that holds `part`."""
    blocks = re.findall(rf"```{language}\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)
    (found,) = [block for block in blocks if part in block]
    return str(found)


def test_readme_python_client_runs(tmp_path: Path) -> None:
    """The ten lines print every event of a run."""
    with live(burst(3), tmp_path) as server:
        code = readme_example("python", "websockets.sync").replace(
            "127.0.0.1:8000", server.url.removeprefix("http://")
        )
        with process("-c", code, cwd=tmp_path) as client:
            assert client.wait() == 0, client.errors
            assert client.output.decode().splitlines()[1:] == [
                *(f"LOG line {n}" for n in range(3)),
                "RESULT done",
                "TASK_COMPLETE done",
            ]


def test_readme_javascript_client_runs(tmp_path: Path, chromium: Any) -> None:
    """The ten lines, in a page of the service's own, log every event of a run."""
    said: list[str] = []
    chromium.on("console", lambda message: said.append(message.text))
    with live(burst(3), tmp_path) as server:
        chromium.goto(server.url)
        with chromium.expect_console_message(
            lambda message: message.text.startswith("closed")
        ) as closed:
            chromium.evaluate(f"async () => {{ {readme_example('js', 'WebSocket')} }}")
    assert closed.value.text == "closed 1000"
    assert said[1:-1] == [*(f"LOG line {n}" for n in range(3)), "RESULT done", "TASK_COMPLETE done"]


def test_readme_react_example_of_another_origin_runs(tmp_path: Path, chromium: Any) -> None:
    """`useChat` from an origin that is allowed: a run, a reload in its middle, a cancel."""
    (tmp_path / "node_modules").symlink_to(node_modules())
    bundler = str(tmp_path / "node_modules" / ".bin" / "esbuild")
    build = [bundler, "--bundle", "app.jsx", "--outfile=app.js", "--jsx=automatic"]
    build += ["--define:process.env.NODE_ENV='x'", "--log-level=error"]
    code = readme_example("jsx", "useChat")
    code = code.replace("Transport({", 'Transport({ credentials: "include",')
    code += "import { createRoot } from 'react-dom/client';\n"
    code += "createRoot(document.body).render(<Team id='a b/c?' />);\n"

    async def page(request: Request) -> Response:
        script = (tmp_path / "app.js").read_text().replace("</script", "<\\/script")
        return Response(f"<body></body><script>{script}</script>", media_type="text/html")

    site = uvicorn.Server(uvicorn.Config(Starlette(routes=[Route("/", page)]), log_level="error"))
    team = TwoAtOnce()
    with serving(site, loopback()) as origin, live(team, tmp_path, allowed_origins=(origin,)) as to:
        (tmp_path / "app.jsx").write_text(code.replace("http://127.0.0.1:8000", to.url))
        subprocess.run(build, cwd=tmp_path, check=True)
        chromium.goto(origin)
        chromium.fill("input", "two")
        chromium.press("input", "Enter")
        chromium.wait_for_selector("pre.assistant:has-text('4 <script>')")
        chromium.reload()
        chromium.wait_for_selector("pre.assistant:has-text('4 <script>')")
        team.go.set()
        chromium.wait_for_selector("output:has-text('ready')")
        shown = str(chromium.text_content("pre.assistant"))
        assert [shown.count(f"{number} {ODD_TEXT}") for number in range(10)] == 10 * [4]
        team.go.clear()
        chromium.fill("input", "one that is cancelled")
        chromium.press("input", "Enter")
        answer = "pre.user:has-text('cancelled') + pre.assistant:has-text('4 <script>')"
        chromium.wait_for_selector(answer)
        chromium.click("button")
        chromium.wait_for_selector("output:has-text('ready')")
        tasks = to.get("/api/tasks")["items"]
        assert [(task["status"], task["options"]["n_round"]) for task in tasks] == [
            ("CANCELLED", 3),
            ("SUCCEEDED", 3),
        ]


def test_readme_ag_ui_example_runs(tmp_path: Path) -> None:
    """It prints what the team says and logs, and the result."""
    (tmp_path / "node_modules").symlink_to(node_modules())
    team = TwoAtOnce()
    team.go.set()
    with live(team, tmp_path) as server:
        code = readme_example("js", "await agent.runAgent")
        (tmp_path / "client.mjs").write_text(code.replace("http://127.0.0.1:8000", server.url))
        command = ["node", "client.mjs"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        (task,) = server.get("/api/tasks")["items"]
    assert done.stdout.startswith("REASONING hm\n0 <script>")
    assert [done.stdout.count(f"{number} {ODD_TEXT}") for number in range(10)] == 10 * [4]
    assert done.stdout.endswith("ERROR Bob stumbled\nresult { message: 'done', answer: 42 }\n")
    assert task["options"]["n_round"] == 3


@pytest.mark.parametrize("package", ["@ag-ui/client", "ag-ui-client-before-1"])
def test_readme_copilotkit_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    """CopilotKit's client, through its runtime: a question, the answer, a reload, a refusal."""
    monkeypatch.setenv("COPILOTKIT_TELEMETRY_DISABLED", "true")
    packages = f"@copilotkit/runtime@{NODE_PACKAGES['@copilotkit/runtime']} "
    packages += NODE_PACKAGES["ag-ui-client-before-1"].removeprefix("npm:")
    assert f"`npm install {packages}`" in (HERE / "README.md").read_text()
    with loopback() as free:
        port = str(free.getsockname()[1])
    code = readme_example("js", "CopilotRuntime").replace("@ag-ui/client", package)
    with process("-c", QUICK, "--test-mode", "--port", "0", cwd=tmp_path) as server:
        client = server.client
        code = code.replace("http://127.0.0.1:8000", client.url).replace("4000", port)
        (tmp_path / "server.mjs").write_text(code)
        url = f"http://127.0.0.1:{port}/api/copilotkit"
        with front_end(tmp_path, COPILOTKIT_CLIENT, url) as agent:
            shown = agent("send", "Build a todo app")
            assert (shown["told"][-1], shown["state"]["status"]) == ("QUESTION", "RUNNING")
            shown = agent("send", "use SQLite")
            assert shown["state"]["status"] == "SUCCEEDED"
            spoken = spoken_in_log(client, shown["state"]["task_id"])
            assert "use SQLite" in str(spoken["Architect"])
            assert spoken_in_ag_ui(shown["messages"]) == spoken
            assert spoken_in_ag_ui(agent("reload")["messages"]) == spoken
            assert "1 to 32000 characters" in agent("send", " ")["told"][-1]
        assert client.get("/api/tasks")["total"] == 1


def test_readme_mounting_example_runs(tmp_path: Path) -> None:
    code = readme_example("python", "Mount(")
    code += "from starlette.testclient import TestClient\n"
    code += "with TestClient(app, 'http://localhost') as client:\n"
    code += "    print(client.get('/agents/healthz').json())"
    with process("-c", code, cwd=tmp_path) as client:
        assert client.wait() == 0, client.errors
        assert b"'status': 'ok'" in client.output


def test_readme_commands_run_as_written(tmp_path: Path) -> None:
    """Those with `.venv/bin/python`, but for installing and the tests, by the scripted team."""
    (tmp_path / "my_teams.py").write_text(readme_example("python", "def debate"))
    text = (HERE / "README.md").read_text()
    commands = re.findall(r"\.venv/bin/python ([^`&\n#]*)", text)
    seen = set()
    for command in {command.strip() for command in commands}:
        words = [word.replace("$TASK", "0" * 32) for word in shlex.split(command)]
        if words[:2] == ["-m", "pytest"] or "bench" in words:
            continue
        seen.add(words[0])
        serves = words[0] == "streamer.py" and "run" not in words
        words[0] = str(HERE / words[0])
        environ = {"STREAMER_PORT": "0", "STREAMER_TEST_MODE": "1", "STREAMER_TASK_TIMEOUT": "0.1"}
        environ["STREAMER_TOKEN"] = TOKEN
        if "--port" in words:
            words[words.index("--port") + 1] = "0"
        with process(*words, cwd=tmp_path, environ=environ) as started:
            if serves:
                assert started.says(" is at http://"), started.errors
            else:  # a task that is cut short; no such task
                assert started.wait() == (1 if "run" in words else 2), started.errors
                assert "streamer: " not in "".join(started.errors)
    assert seen == {"streamer.py", "test_streamer.py"}


def test_readme_sidecar_files_are_valid(tmp_path: Path) -> None:
    """The Compose file and the unit: by their own tools where installed, their syntax anywhere."""
    compose = readme_example("yaml", "services:")
    services = yaml.safe_load(compose)["services"]
    install = "pip install --no-cache-dir --no-deps --ignore-requires-python -r requirements.txt"
    assert install in services["streamer"]["build"]["dockerfile_inline"]  # once, at no start
    assert services["streamer"]["healthcheck"]["test"][:2] == ["CMD", "python"]
    compile(services["streamer"]["healthcheck"]["test"][3], "healthcheck", "exec")
    (tmp_path / "compose.yaml").write_text(compose)
    if (
        shutil.which("docker")
        and subprocess.run(["docker", "compose", "version"], capture_output=True).returncode == 0
    ):
        subprocess.run(["docker", "compose", "config", "--quiet"], cwd=tmp_path, check=True)
    unit = readme_example("ini", "[Service]")
    configparser.ConfigParser(strict=True).read_string(unit)
    if shutil.which("systemd-analyze"):
        (tmp_path / "streamer.service").write_text(
            unit.replace("/srv/streamer/.venv/bin/python", sys.executable)
        )
        done = subprocess.run(
            ["systemd-analyze", "verify", "./streamer.service"], cwd=tmp_path, capture_output=True
        )
        assert done.returncode == 0, done.stderr


def test_readme_names_what_there_is() -> None:
    """Every route, event type and option; flags as --help has them, which has every setting."""
    text = (HERE / "README.md").read_text()
    operations = streamer.OPERATIONS + streamer.PROTOCOL_OPERATIONS
    routes = {(each.method, re.sub("task_|:path", "", each.path)) for each in operations}
    assert set(re.findall("`(GET|POST|DELETE) (/[^`]*)`", text)) == {*routes, ("GET", "/")}
    (types,) = re.findall(r"\n\| Event type .*\n((?:\|.*\n)*)", text)
    assert set(re.findall("`([A-Z_]{3,})`", types)) == set(EventType)
    missing = [name for name in streamer.OPTIONS if not re.search(f'["`]{name}\\b', text)]
    assert missing == []
    shown = f" {streamer.help_text()} ".replace("\n", " ")
    flags = {streamer.flag_of(name) for name in Settings.__dataclass_fields__}
    assert [flag for flag in flags if not re.search(f" {flag}[= ]", shown)] == []
    given = set(re.findall("`(--[^` ]*)", text)) - {"--no-deps"}  # pip's
    assert [flag for flag in given if not re.search(f" {flag}[,; =]", shown)] == []
    variables = {f"STREAMER_{name.upper()}" for name in Settings.__dataclass_fields__}
    assert set(re.findall("STREAMER_[A-Z_]+", text)) <= variables


def test_readme_tells_all_of_a_payload(scripted: Client) -> None:
    """What a whole run's events hold stands in the table of event types."""
    rows = re.findall(r"\n\| (`[A-Z_`, ]*`) \| (.*) \|", (HERE / "README.md").read_text())
    told = {kind: fields for kinds, fields in rows for kind in re.findall(r"\w+", kinds)}
    task_id = scripted.create("0.001", options={"approve": ["WritePRD"]})
    events = answering(scripted, task_id, "continue").events
    assert {event["event_type"] for event in events} >= {"RESULT", "QUESTION", "ANSWER", "TOKEN"}
    for event in events:
        names = [*event["payload"]]
        names.remove("message")
        assert [name for name in names if f"`{name}`" not in told[event["event_type"]]] == []


def test_readme_samples_are_whole(scripted: Client) -> None:
    """The task, the state and the event have the fields of real ones; the options are defaults."""
    task_id = scripted.create("0.001")
    scripted.watch(task_id)
    task = json.loads(readme_example("json", '"input_prompt"'))
    real_task = scripted.get(f"/api/tasks/{task_id}")
    assert list(task) == list(real_task)
    assert task["options"] == real_task["options"]
    state = json.loads(readme_example("json", '"progress"'))
    real_state = scripted.get(f"/api/tasks/{task_id}/state")
    assert list(state) == list(real_state)
    assert list(state["cost"]) == list(real_state["cost"])
    event_id, data = readme_example("text", "data: ").splitlines()
    message = json.loads(data.removeprefix("data: "))
    event = message["data"]
    real = scripted.get(f"/api/tasks/{task_id}/events?types=ARTIFACT")["events"][0]
    assert (event_id, message["type"]) == (f"id: {event['event_id']}", "event")
    assert list(event) == list(real)
    assert list(event["payload"]) == list(real["payload"])


def test_readme_embedding_example_runs(tmp_path: Path) -> None:
    """The runner of one's own, as the README shows it, says where it is, speaks and asks."""
    code = readme_example("python", "working on").replace(
        "Settings()", "Settings(port=0, test_mode=True)"
    )
    with process("-c", code, cwd=tmp_path) as server:
        record = answering(server.client, server.client.create(), "red")
    assert record.last_state["final_result"] == {"colour": "red"}
    assert record.of("MESSAGE")


def test_readme_team_runs(tmp_path: Path) -> None:
    """The team of one's own, as the README writes and starts it."""
    (tmp_path / "my_teams.py").write_text(readme_example("python", "def debate"))
    (command,) = [line for line in readme_blocks("A team of your own") if " run " in line]
    with model_server() as (model, url):
        environ = {"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": url}
        words = shlex.split(command.removeprefix(".venv/bin/python streamer.py"))
        with process(SERVER, *words, cwd=tmp_path, environ=environ) as done:
            assert done.wait() == 0, done.errors
    assert re.findall(r"(?m)^(\w+) starts (\w+)$", done.output.decode()) == [
        ("Alex", "AlexSay"),
        ("Bob", "BobSay"),
        ("Alex", "AlexSay"),
        ("Bob", "BobSay"),
    ]
    assert len(model.requests[""]) == 4


# -----------------------------------------------------------------------------
# Commands
# -----------------------------------------------------------------------------


def answer_here(websocket: ClientConnection, question: Mapping[str, Any]) -> None:
    """Sends the next line of standard input."""
    line = b""
    while not line.endswith(b"\n"):
        line += (piece := os.read(0, 1))
        if not piece:
            return
    given = {"question_id": question["question_id"], "answer": line.decode().strip()}
    with contextlib.suppress(ConnectionClosed):
        websocket.send(json.dumps({"type": "answer", **given}))


def watch(task_id: str, url: str, token: str = "") -> int:
    """Shows a task as `wscat` would, but readable; resumes what drops, while it gets further."""
    transcript = streamer.Transcript()
    after = 0
    status = ""
    cursor = -1
    headers = {"Authorization": f"Bearer {token}"} if token else None
    question: Any = None
    while cursor < after or cursor == -1:
        cursor = max(after, 0)
        address = f"{url.rstrip('/').replace('http', 'ws', 1)}/ws/tasks/{task_id}?after={after}"
        try:
            with connect(address, max_size=None, additional_headers=headers) as websocket:
                for text in websocket:
                    message = json.loads(text)
                    transcript.show(message)
                    after = message["data"].get("event_id", after)
                    status = message["data"].get("status", status)
                    before = question
                    if message["type"] == "state":
                        question = message["data"].get("question")
                    refused = message["type"] == "error"
                    if refused and not question:
                        return 2
                    if question and (refused or question != before):
                        transcript.ask(question)
                        answering_here = partial(answer_here, websocket, question)
                        threading.Thread(target=answering_here, daemon=True).start()
                return 0 if status == TaskStatus.SUCCEEDED else 1
        except ConnectionClosed as error:
            print(f"\nconnection lost ({error}); resuming after event {after}", file=sys.stderr)
        except OSError as error:
            print(f"cannot connect to {url}: {error}", file=sys.stderr)
            return 2
    return 2


# The benchmark: server on one core, clients on another, everything over loopback. Ratios within
# one run hold from machine to machine; absolute figures do not.

LOAD = """
import time
import streamer
from streamer import Settings, create_app, serve
PAD = "x" * 90
def load(run):
    if run.prompt.startswith("Build"):
        return streamer.run_metagpt(run)
    a = dict(word.split("=") for word in run.prompt.split())
    start, n, rate = time.monotonic(), int(a["n"]), float(a.get("rate", 0))
    for i in range(1, n + 1):
        if rate and (rest := start + i / rate - time.monotonic()) > 0:
            time.sleep(rest)
        run.emit("LOG", {"t": time.monotonic_ns(), "message": PAD}, "Engineer")
    return {"seconds": time.monotonic() - start}
if __name__ == "__main__":
    streamer.logging.basicConfig(level="INFO")
    settings = Settings.from_environ(port="0", test_mode="1")
    serve(create_app(settings, runner=load), settings)
"""
BROADCAST = """
import asyncio, json, logging, socket, threading, time
import uvloop
from websockets.asyncio.server import broadcast, serve
PAD, clients = "x" * 90, set()
def load(loop, n, rate):
    start = time.monotonic()
    for i in range(1, n + 1):
        if rate and (rest := start + i / rate - time.monotonic()) > 0:
            time.sleep(rest)
        payload = {"t": time.monotonic_ns(), "message": PAD}
        data = {"event_id": i, "task_id": "t" * 32, "timestamp": "2026-01-01T00:00:00.000Z",
                "agent_role": "Engineer", "event_type": "LOG", "payload": payload}
        loop.call_soon_threadsafe(broadcast, clients, json.dumps({"type": "event", "data": data}))
async def main():
    loop = asyncio.get_running_loop()
    async def handler(socket):
        clients.add(socket)
        try:
            async for text in socket:  # "n rate": go
                n, rate = text.split()
                threading.Thread(target=load, args=(loop, int(n), float(rate))).start()
        finally:
            clients.discard(socket)
    listening = socket.create_server(("127.0.0.1", 0))
    logging.basicConfig(level="INFO")
    async with serve(handler, sock=listening, compression=None, write_limit=2**30):
        logging.info("it is at http://127.0.0.1:%d", listening.getsockname()[1])
        await asyncio.Future()
uvloop.run(main())
"""
BARE = """
import logging, uvicorn
async def app(scope, receive, send):
    if scope["type"] == "http":
        headers = [(b"content-length", b"2")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"{}"})
    elif scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.accept"})
        await receive()
class Server(uvicorn.Server):
    def _log_started_message(self, listeners):
        port = listeners[0].getsockname()[1]
        logging.getLogger("bare").info("it is at http://127.0.0.1:%d", port)
logging.basicConfig(level="INFO")
options = {"log_config": None, "access_log": False, "ws_per_message_deflate": False}
Server(uvicorn.Config(app, port=0, **options)).run()
"""


@contextlib.contextmanager
def bench_server(code: str, folder: Path, **environ: str) -> Iterator[Process]:
    """A server on the first core, as a user starts it; this process keeps to the last one."""
    environ = {
        **{name: os.environ[name] for name in os.environ if name.startswith("STREAMER_")},
        **environ,
    }
    with process(
        "-c", f"import os; os.sched_setaffinity(0, {{0}})\n{code}", cwd=folder, environ=environ
    ) as server:
        yield server


class Swarm:
    """Many cheap WebSocket clients in one loop: what comes is looked at when the clock stands."""

    def __init__(self, url: str, paths: list[str], small: bool = False, keep: bool = True) -> None:
        self.host, port = url.removeprefix("http://").split(":")
        self.address = (self.host, int(port))
        self.selector = selectors.DefaultSelector()
        self.keep = keep
        self.chunks: list[list[tuple[int, bytes]]] = [[] for _ in paths]
        self.sockets = [self._connect(path, small) for path in paths]
        for index, sock in enumerate(self.sockets):
            self.selector.register(sock, selectors.EVENT_READ, index)

    def _connect(self, path: str, small: bool) -> socket.socket:
        sock = socket.socket()
        if small:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(self.address)
        head = f"GET {path} HTTP/1.1\r\nHost: {self.host}\r\n"
        head += "Upgrade: websocket\r\nConnection: Upgrade\r\n"
        key = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        sock.sendall((head + key).encode())
        answer = b""
        while b"\r\n\r\n" not in answer:
            answer += sock.recv(1)
        assert answer.startswith(b"HTTP/1.1 101"), answer
        sock.setblocking(False)
        return sock

    def say(self, text: str) -> None:
        """A masked text frame, as a client must send it, from the first one."""
        self.sockets[0].setblocking(True)
        self.sockets[0].sendall(bytes((0x81, 0x80 | len(text), 0, 0, 0, 0)) + text.encode())
        self.sockets[0].setblocking(False)

    def receive(self, per_client: int) -> float:
        """Reads until each client has so many events; seconds from the first to the last byte."""
        left = dict.fromkeys(range(len(self.sockets)), per_client)
        tails: dict[int, bytes] = defaultdict(bytes)
        first = last = 0.0
        end = time.monotonic() + 2 * TIMEOUT
        while left and time.monotonic() < end:
            for key, _ in self.selector.select(1.0):
                data = key.fileobj.recv(1 << 20)  # type: ignore[union-attr]
                at = time.monotonic_ns()
                if self.keep:
                    self.chunks[key.data].append((at, data))
                joined = tails[key.data] + data
                count = joined.count(b'"t":')
                tails[key.data] = joined[-3:]
                if count and key.data in left:
                    first, last = first or at, at
                    left[key.data] -= count
                    if left[key.data] <= 0:
                        del left[key.data]
                if not data:
                    self.selector.unregister(key.fileobj)
                    left.pop(key.data, None)
        return (last - first) / 1e9

    def check(self, per_client: int) -> None:
        """Every client has every event, in order, each once."""
        for chunks in self.chunks:
            data = b"".join(chunk for _, chunk in chunks)
            found = re.findall(rb'"event_id": ?(\d+),(?:(?!"event_id").){0,250}?"t":', data)
            ids = list(map(int, found))
            assert ids == list(range(ids[0], ids[0] + per_client)), (len(ids), per_client)

    def latencies(self) -> list[float]:
        """Milliseconds from emit to receipt, sorted."""
        found = []
        for chunks in self.chunks:
            tail = b""
            for at, chunk in chunks:
                data = tail + chunk
                found += [(at - int(t)) / 1e6 for t in re.findall(rb'"t": ?(\d+),', data)]
                tail = (
                    data[max(data.rfind(b'"t":'), len(data) - 40) :]
                    if not data.endswith(b"}")
                    else b""
                )
        return sorted(found)

    def close(self) -> None:
        for sock in self.sockets:
            sock.close()
        self.selector.close()


def cpu_and_rss(server: Process) -> tuple[float, float]:
    """CPU seconds so far, and resident megabytes."""
    fields = Path(f"/proc/{server.popen.pid}/stat").read_text().rsplit(")", 1)[1].split()
    status = Path(f"/proc/{server.popen.pid}/status").read_text()
    resident = int(re.search(r"VmRSS:\s+(\d+)", status)[1])  # type: ignore[index]
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"), resident / 1024


def percentiles(values: list[float]) -> tuple[float, float]:
    return values[len(values) // 2], values[len(values) * 99 // 100]


def measure(
    server: Process, clients: int, events: int, rate: float = 0, product: bool = True
) -> dict[str, float]:
    """One task of so many events, watched by so many clients from before its first."""
    client = server.client
    path = f"/ws/tasks/{client.create(f'n={events} rate={rate}')}?start=false" if product else "/"
    swarm = Swarm(client.url, [path] * clients)
    cpu, _ = cpu_and_rss(server)
    if product:
        client.post(f"/api/tasks/{path.split('/')[-1].split('?')[0]}/run")
    else:
        swarm.say(f"{events} {rate}")
    seconds = swarm.receive(events)
    used = cpu_and_rss(server)[0] - cpu
    swarm.check(events)
    p50, p99 = percentiles(swarm.latencies()) if rate else (0.0, 0.0)
    swarm.close()
    return {"per_s": clients * events / seconds, "p50": p50, "p99": p99, "cpu": used}


def bench_against_broadcast(folder: Path) -> Iterator[tuple[str, str, str]]:
    with bench_server(LOAD, folder) as ours, bench_server(BROADCAST, folder) as peer:
        for clients, events, target in ((1, 20000, "1.5"), (100, 5000, "10")):
            rows = [
                (measure(ours, clients, events), measure(peer, clients, events, product=False))
                for _ in range(3)
            ]
            mine, theirs = (
                statistics.median(row[side]["per_s"] for row in rows) for side in (0, 1)
            )
            text = f"{mine:,.0f} /s, {mine / theirs:.1f} x websockets.broadcast ({theirs:,.0f} /s)"
            yield f"burst, K={clients}", text, f">= {target} x"
        pairs = [
            (measure(ours, 50, 2000, 200), measure(peer, 50, 2000, 200, product=False))
            for _ in range(3)
        ]
        for key, unit in (("p50", "ms"), ("p99", "ms"), ("cpu", "s CPU")):
            mine, theirs = (statistics.median(pair[side][key] for pair in pairs) for side in (0, 1))
            text = f"{mine:.2f} {unit}, {mine / theirs:.2f} x websockets.broadcast ({theirs:.2f})"
            yield f"200 events/s, K=50: {key}", text, "<= 1.25 x"


def bench_emit(folder: Path) -> Iterator[tuple[str, str, str]]:
    with bench_server(LOAD, folder) as server:
        states = [
            server.client.watch(server.client.create("n=20000"), "types=RESULT").last_state
            for _ in range(3)
        ]
        spent = min(state["final_result"]["seconds"] for state in states)
        yield "emit() in the worker thread", f"{spent / 20000 * 1e6:.1f} us an event", "<= 15 us"


def bench_late_joiner(folder: Path) -> Iterator[tuple[str, str, str]]:
    with bench_server(LOAD, folder, STREAMER_MAX_EVENTS="30000") as server:
        client = server.client
        history = client.create("n=20000")
        client.watch(history, "types=RESULT")
        paced = Swarm(client.url, [f"/ws/tasks/{client.create('n=600 rate=200')}"] * 10)
        reading = threading.Thread(target=paced.receive, args=(600,))
        reading.start()
        times = []
        late = []
        for _ in range(5):
            start = time.monotonic()
            late.append(Swarm(client.url, [f"/ws/tasks/{history}?start=false"]))
            late[-1].receive(20000)
            times.append(time.monotonic() - start)
        reading.join()
        for swarm, events in [*((swarm, 20000) for swarm in late), (paced, 600)]:
            swarm.check(events)
            swarm.close()
        yield (
            "late joiner, 20,000 events",
            f"{statistics.median(times):.3f} s to the last",
            "<= 0.25 s",
        )
        yield (
            "  another task's clients meanwhile",
            f"p99 {percentiles(paced.latencies())[1]:.1f} ms",
            "<= 20 ms",
        )


def bench_stalled_client(folder: Path) -> Iterator[tuple[str, str, str]]:
    with bench_server(LOAD, folder) as server:
        client = server.client
        rates: dict[bool, list[float]] = {False: [], True: []}
        grown = []
        for stalled in [False, True] * 4:
            path = f"/ws/tasks/{client.create('n=20000')}?start=false"
            idle = Swarm(client.url, [path] * stalled, small=True)
            swarm = Swarm(client.url, [path] * 49)
            before = cpu_and_rss(server)[1]
            client.post(f"{path.split('?')[0].replace('/ws', '/api')}/run")
            rates[stalled].append(swarm.receive(20000))
            grown.append(cpu_and_rss(server)[1] - before)
            swarm.check(20000)
            swarm.close()
            idle.close()
        ratio = statistics.median(rates[True]) / statistics.median(rates[False])
        yield (
            "one client that never reads, 49 that do",
            f"{ratio:.2f} x the time without it",
            "<= 1.1 x",
        )
        yield (
            "  memory",
            f"grew {max(grown[1::2]):.0f} MB with it, {max(grown[::2]):.0f} MB without",
            "flat",
        )


def bench_idle_connections(folder: Path) -> Iterator[tuple[str, str, str]]:
    sizes = []
    for code, path in ((LOAD, "/ws/tasks/{}?start=false"), (BARE, "/")):
        with bench_server(code, folder, STREAMER_MAX_SOCKETS="2000") as server:
            path = path.format(server.client.create("n=1") if code is LOAD else "")
            Swarm(server.client.url, [path]).close()
            before = cpu_and_rss(server)[1]
            swarm = Swarm(server.client.url, [path] * 1000)
            sizes.append((cpu_and_rss(server)[1] - before) * 1024 / 1000)
            swarm.close()
    yield (
        "idle connection, at 1,000",
        f"{sizes[0]:.1f} KB (bare ASGI on uvicorn: {sizes[1]:.1f} KB)",
        "<= 25 KB",
    )


def bench_start(folder: Path) -> Iterator[tuple[str, str, str]]:
    times: dict[str, list[float]] = {LOAD: [], BARE: []}
    for code in [LOAD, BARE] * 5:
        start = time.monotonic()
        with bench_server(code, folder) as server:
            server.client.get("/healthz")
            times[code].append(time.monotonic() - start)
    mine, bare = (statistics.median(values) for values in times.values())
    yield "start to first answer", f"{mine:.2f} s (bare uvicorn: {bare:.2f} s)", "<= 0.6 s"


def bench_metagpt(folder: Path) -> Iterator[tuple[str, str, str]]:
    with (
        model_server() as (_, url),
        bench_server(LOAD, folder, OPENAI_API_KEY=KEY, OPENAI_BASE_URL=url) as server,
    ):
        path = f"/ws/tasks/{server.client.create('n=3000 rate=200')}"
        teams = [server.client.create(f"Build [mark=team{number}]") for number in range(3)]
        swarm = Swarm(server.client.url, [path] * 10)
        for team in teams:
            server.client.post(f"/api/tasks/{team}/run")
        swarm.receive(3000)
        swarm.check(3000)
        p50, p99 = percentiles(swarm.latencies())
        swarm.close()
        ends = {server.client.get(f"/api/tasks/{team}")["status"] for team in teams}
        measured = f"p50 {p50:.1f} ms, p99 {p99:.1f} ms (three teams {', '.join(ends)} meanwhile)"
        yield "200 events/s while MetaGPT imports and runs", measured, "p99 <= 50 ms"


def bench_many_tasks(folder: Path) -> Iterator[tuple[str, str, str]]:
    with bench_server(LOAD, folder, STREAMER_MAX_RUNNING="100") as server:
        tasks = [server.client.create("n=200 rate=20") for _ in range(100)]
        swarm = Swarm(
            server.client.url,
            [f"/ws/tasks/{task}?start=false" for task in tasks for _ in range(10)],
        )
        for task in tasks:
            server.client.post(f"/api/tasks/{task}/run")
        swarm.receive(200)
        swarm.check(200)
        p50, p99 = percentiles(swarm.latencies())
        swarm.close()
        measured = f"p50 {p50:.1f} ms, p99 {p99:.1f} ms, none lost"
        yield "100 tasks, 10 clients, 20 events/s each", measured, "p99 <= 100 ms"


def bench_memory(folder: Path) -> Iterator[tuple[str, str, str]]:
    with bench_server(LOAD, folder, STREAMER_MAX_TASKS="200") as server:
        client = server.client

        def sizes() -> str:
            status = Path(f"/proc/{server.popen.pid}/status").read_text()
            kilobytes = dict(re.findall(r"^(VmHWM|VmRSS):\s+(\d+)", status, re.MULTILINE))
            return (
                f"{int(kilobytes['VmRSS']) // 1024} MB, peak {int(kilobytes['VmHWM']) // 1024} MB"
            )

        client.watch(client.create("n=10"), "types=RESULT")
        yield "memory: after the first task", sizes(), ""
        for done, more in ((1000, 999), (5000, 4000), (10_000, 5000)):
            for _ in range(more):
                client.watch(client.create("n=10"), "types=RESULT")
            yield f"  {done:,} finished tasks, 200 kept", sizes(), "flat"
        for _ in range(2000):
            Swarm(client.url, [f"/ws/tasks/{client.get('/api/tasks')['items'][0]['id']}"]).close()
        yield "  2,000 clients that connect and drop", sizes(), "flat"
        client.watch(client.create("n=1000000"), "types=RESULT")
        yield "  a million events, 20,000 kept, nobody watching", sizes(), "bounded"
        for watchers, stalled in ((100, 0), (1, 1)):
            prompt = "n=200000" if watchers > 1 else "n=1000000"
            path = f"/ws/tasks/{client.create(prompt)}?start=false"
            idle = Swarm(client.url, [path] * stalled, small=True)
            swarm = Swarm(client.url, [path] * watchers, keep=False)
            client.post(f"{path.split('?')[0].replace('/ws', '/api')}/run")
            swarm.receive(200_000 if watchers > 1 else 1_000_000)
            what = (
                "200,000 events, 100 watching"
                if watchers > 1
                else "a million, one watching, one never reading"
            )
            yield f"  {what}", sizes(), "bounded"
            swarm.close()
            idle.close()


def bench_stores(folder: Path) -> Iterator[tuple[str, str, str]]:
    """What each store costs, beside memory in the same run; Redis if `redis-server` is there."""
    redis_server = RedisServer(folder)
    with contextlib.ExitStack() as stack:
        environs = {"memory": {}, "SQLite": {"STREAMER_DB": "bench.db"}}
        if shutil.which("redis-server"):
            redis_server.start("--appendfsync", "everysec")
            stack.callback(redis_server.kill)
            environs["Redis"] = {"STREAMER_REDIS_URL": redis_server.url}
        servers = {
            name: stack.enter_context(bench_server(LOAD, folder, **each))
            for name, each in environs.items()
        }
        for clients, events in ((1, 20000), (100, 5000)):
            for name, server in servers.items():
                rates = [measure(server, clients, events)["per_s"] for _ in range(3)]
                target = ">= 100,000 /s" if (name, clients) == ("SQLite", 100) else ""
                yield f"{name}: burst, K={clients}", f"{statistics.median(rates):,.0f} /s", target
        turns = [
            {name: measure(server, 50, 2000, 200) for name, server in servers.items()}
            for _ in range(3)
        ]
        memory = statistics.median(turn["memory"]["p99"] for turn in turns)
        for name in servers:
            p50, p99, cpu = (
                statistics.median(turn[name][key] for turn in turns)
                for key in ("p50", "p99", "cpu")
            )
            target = f"p99 <= {memory + 5:.1f} ms" if name == "SQLite" else ""
            yield (
                f"{name}: 200 events/s, K=50",
                f"p50 {p50:.2f} ms, p99 {p99:.2f} ms, {cpu:.2f} s CPU",
                target,
            )
    with bench_server(
        LOAD, folder, STREAMER_DB="million.db", STREAMER_MAX_EVENTS="2000000"
    ) as server:
        task_id = server.client.create("n=1000000")
        server.client.watch(task_id, "types=RESULT")
        size = (folder / "million.db").stat().st_size / 1e6
        before = cpu_and_rss(server)[1]
        swarm = Swarm(server.client.url, [f"/ws/tasks/{task_id}"], keep=False)
        seconds = swarm.receive(1_000_000)
        grown = cpu_and_rss(server)[1] - before
        swarm.close()
        yield (
            "SQLite: a million events",
            f"{size:.0f} bytes an event in the file; {before:.0f} MB resident",
            "bounded",
        )
        yield "  replayed", f"{1e6 / seconds:,.0f} /s, grew {grown:.0f} MB", "bounded"


BENCHMARKS = {
    "broadcast": bench_against_broadcast,
    "emit": bench_emit,
    "late": bench_late_joiner,
    "stalled": bench_stalled_client,
    "idle": bench_idle_connections,
    "start": bench_start,
    "metagpt": bench_metagpt,
    "many": bench_many_tasks,
    "memory": bench_memory,
    "stores": bench_stores,
}


def bench(names: list[str]) -> int:
    """Prints the table of targets with what was measured; some four minutes for all of it."""
    if not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < 2:
        print(
            "the benchmark needs Linux and two cores: one for the server, one for its clients",
            file=sys.stderr,
        )
        return 2
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as folder:
        for name in names or BENCHMARKS:
            for what, measured, target in BENCHMARKS[name](Path(folder)):
                print(f"{what:42} {measured:78} target {target}", flush=True)
    return 0


def main() -> int:
    if sys.argv[1:2] == ["bench"]:
        parser = argparse.ArgumentParser(prog="test_streamer.py bench", description=bench.__doc__)
        parser.add_argument(
            "names", nargs="*", metavar="name", help=f"some of {', '.join(BENCHMARKS)}"
        )
        names = parser.parse_args(sys.argv[2:]).names
        if unknown := set(names) - set(BENCHMARKS):
            parser.error(f"unknown: {', '.join(unknown)}")
        return bench(names)
    parser = argparse.ArgumentParser(
        description="Watch a task on a running streamer. Exits 0 if it SUCCEEDED."
    )
    parser.add_argument(
        "task_id", help="the id that POST /api/tasks answered; `bench` runs the benchmark"
    )
    parser.add_argument(
        "--url", default="http://127.0.0.1:8000", help="of the server (http://127.0.0.1:8000)"
    )
    parser.add_argument(
        "--token",
        default=os.environ.get("STREAMER_TOKEN", ""),
        help="the server's (STREAMER_TOKEN)",
    )
    arguments = parser.parse_args()
    return watch(arguments.task_id, arguments.url, arguments.token)


if __name__ == "__main__":
    sys.exit(main())
