"""Tests of streamer, in the order of its sections, and two commands beside them.

    pytest                                      the tests
    python test_streamer.py <task_id> [--url …] watch a task on a running server; exits 0 if it SUCCEEDED

MetaGPT is tested by running it: `ModelServer` stands in for the model's HTTP API, not for MetaGPT. What
crosses a socket is tested over a real one, most of it against `python streamer.py`. Nothing sleeps to wait:
gates (threading.Event), closing streams and one TIMEOUT decide.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import importlib.metadata
import itertools
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import httpx2
import pytest
import uvicorn
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

import streamer
from streamer import EventType, Run, Settings, TaskStatus, create_app

HERE = Path(__file__).resolve().parent
TIMEOUT = 60.0  # seconds; what takes longer hangs
KEY = "sk-secret-0123456789abcdef"
WHOLE_RUN = set(EventType) - {"ERROR", "TASK_ERROR", "TASK_CANCELLED"}  # what a run that succeeds produces
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
        return connect(url, open_timeout=TIMEOUT, close_timeout=TIMEOUT, max_size=None, compression=None)

    def watch(self, task_id: str, query: str = "") -> Record:
        with self.socket(task_id, query) as websocket:
            return Record(websocket)


class Record:
    """What a socket sent until it closed."""

    def __init__(self, websocket: ClientConnection) -> None:
        self.messages: list[dict[str, Any]] = []
        with contextlib.suppress(ConnectionClosed):
            while True:
                self.messages.append(json.loads(websocket.recv(timeout=TIMEOUT)))
        self.close_code = websocket.close_code

    def data(self, kind: str) -> list[dict[str, Any]]:
        return [message["data"] for message in self.messages if message["type"] == kind]

    @property
    def events(self) -> list[dict[str, Any]]:
        return self.data("event")

    def of(self, *types: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event_type"] in types]

    @property
    def ids(self) -> list[int]:
        return [event["event_id"] for event in self.events]

    @property
    def last_state(self) -> dict[str, Any]:
        return self.data("state")[-1]


def receive_until(websocket: ClientConnection, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    while True:
        message: dict[str, Any] = json.loads(websocket.recv(timeout=TIMEOUT))
        if wanted(message):
            return message


def is_event(event_type: str) -> Callable[[dict[str, Any]], bool]:
    return lambda message: message["data"].get("event_type") == event_type


@contextlib.contextmanager
def serving(server: uvicorn.Server, loopback: socket.socket) -> Iterator[str]:
    """Runs a server in a thread; the socket listens already, so that nobody has to wait for it."""
    loopback.listen(1024)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [loopback]}, name="server")
    thread.start()
    try:
        yield f"http://127.0.0.1:{loopback.getsockname()[1]}"
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
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("STREAMER_", "OPENAI_"))}
        environ = {**clean, "HOME": str(cwd), "PYTHONPATH": str(HERE), "PYTHONWARNINGS": "ignore", **(environ or {})}
        pipe = subprocess.PIPE
        self.popen = subprocess.Popen([sys.executable, *command], cwd=cwd, env=environ, stdout=pipe, stderr=pipe)
        self.errors: list[str] = []
        self.output = b""
        listening: list[str] = []
        self._up = threading.Event()

        def read_errors() -> None:
            assert self.popen.stderr is not None
            for line in self.popen.stderr:
                self.errors.append(line.decode())
                if found := re.search(r"listening url=(\S+)", self.errors[-1]):
                    listening.append(found[1])
                    self._up.set()
            self._up.set()

        def read_output() -> None:
            assert self.popen.stdout is not None
            self.output = self.popen.stdout.read()

        self._readers = [threading.Thread(target=read) for read in (read_errors, read_output)]
        for reader in self._readers:
            reader.start()
        self._listening = listening

    @functools.cached_property
    def client(self) -> Client:
        assert self._up.wait(TIMEOUT)
        assert self._listening, "".join(self.errors)
        return Client(self._listening[0])

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        if self.popen.poll() is None:
            self.popen.send_signal(how)
        return self.wait()

    def wait(self) -> int:
        """The exit code, once everything is read and closed; may be called again."""
        code = self.popen.wait(TIMEOUT)
        if "client" in vars(self):
            self.client.http.close()
        for reader in self._readers:
            reader.join(TIMEOUT)
        for stream in (self.popen.stdout, self.popen.stderr):
            assert stream is not None
            stream.close()
        return code


@contextlib.contextmanager
def process(*command: str, cwd: Path, environ: Mapping[str, str] | None = None) -> Iterator[Process]:
    started = Process(*command, cwd=cwd, environ=environ)
    try:
        yield started
    finally:
        started.stop(signal.SIGKILL)


SERVER = str(HERE / "streamer.py")


MARKS = re.compile(r"\[(?:mark=\w+|task=[^\]\s]+|no usage)\]")


class ModelServer:
    """An OpenAI-compatible API on loopback. A prompt steers it by marks: [mark=…] names the task, [401] its fate."""

    def __init__(self) -> None:
        self.requests: dict[str, list[str]] = defaultdict(list)  # mark → prompts
        self.ports: dict[int, set[str]] = defaultdict(set)  # a client's TCP port → marks that came through it
        self.usage: dict[str, Counter[str]] = defaultdict(Counter)
        self.asked = threading.Event()  # a [slow] prompt has come
        self.slow = threading.Event()  # until it is set, they are not answered

    async def chat(self, request: Request) -> Response:
        body = await request.json()
        prompt = "\n".join(message["content"] for message in body["messages"])
        mark = found[1] if (found := re.search(r"\[mark=(\w+)\]", prompt)) else ""
        self.requests[mark].append(prompt)
        assert request.client is not None
        self.ports[request.client.port].add(mark)
        turn = len(self.requests[mark])
        if "[slow]" in prompt:
            self.asked.set()
            await asyncio.to_thread(self.slow.wait)
        if refusal := self._refusal(prompt, turn):
            return refusal
        text = self._answer(body["messages"][-1]["content"], prompt, mark, turn)
        usage = {"prompt_tokens": len(prompt) // 4, "completion_tokens": len(text) // 4, "total_tokens": 0}
        if "[no usage]" not in prompt:
            self.usage[mark].update(usage)
        head = {"id": "chat", "created": 1, "model": body["model"]}
        if not body.get("stream"):
            choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
            return JSONResponse({**head, "object": "chat.completion", "choices": [choice], "usage": usage})
        return StreamingResponse(self._chunks(head, text, None if "[no usage]" in prompt else usage))

    async def _chunks(self, head: dict[str, Any], text: str, usage: Any) -> Any:
        pieces = re.findall(r"\S+\s*|\s+", text)
        for piece, last in [(piece, False) for piece in pieces] + [("", True)]:
            choice = {"index": 0, "delta": {"content": piece}, "finish_reason": "stop" if last else None}
            chunk = {**head, "object": "chat.completion.chunk", "choices": [choice]}
            yield f"data: {json.dumps({**chunk, **({'usage': usage} if last and usage else {})})}\n\n"
            await asyncio.sleep(0.001)
        yield "data: [DONE]\n\n"

    def _refusal(self, prompt: str, turn: int) -> Response | None:
        if "[503 once]" in prompt and turn == 1:
            return JSONResponse({"error": {"message": "overloaded"}}, 503, {"Retry-After": "1"})
        for status in (401, 404):
            if f"[{status}]" in prompt:
                return JSONResponse({"error": {"message": f"refused, you sent {KEY}"}}, status)
        return None

    def _answer(self, last: str, prompt: str, mark: str, turn: int) -> str:
        if "[garbage]" in prompt or ("[garbage once]" in prompt and turn == 1):
            return "I would rather not answer in JSON."
        if example := re.search(r"## format example\s*\[CONTENT\](.*?)\[/CONTENT\]", last, re.DOTALL):
            answer = json.loads(example[1])
            answer["Anything UNCLEAR"] = " ".join(sorted(set(MARKS.findall(prompt)))) or "no"
            for name in re.findall(r"\[task=(\S+)\]", prompt):
                answer = {**answer, **({"Task list": [name]} if "Task list" in answer else {})}
            return f"[CONTENT]\n{json.dumps(answer, indent=4)}\n[/CONTENT]"
        if "## Code Review Result" in last:
            return f"## Code Review: [mark={mark}]\n1. Yes.\n\n## Actions\npass\n\n## Code Review Result\nLGTM\n"
        return f"```python\nprint('[mark={mark}]')\n```"


@contextlib.contextmanager
def model_server() -> Iterator[tuple[ModelServer, str]]:
    model = ModelServer()
    app = Starlette(routes=[Route("/v1/chat/completions", model.chat, methods=["POST"])])
    config = uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=1, timeout_keep_alive=int(TIMEOUT))
    with serving(uvicorn.Server(config), loopback()) as url:
        try:
            yield model, f"{url}/v1"
        finally:
            model.slow.set()


@pytest.fixture(scope="module")
def metagpt(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Client, ModelServer, Process]]:
    """The real engine behind the stand-in model, as `python streamer.py` starts it; all such tests share it."""
    folder = tmp_path_factory.mktemp("metagpt")
    with model_server() as (model, url):
        environ = {"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": url}
        with process(SERVER, "--port", "0", "--max-running", "12", cwd=folder, environ=environ) as server:
            yield server.client, model, server
            assert server.stop() in (0, -signal.SIGTERM)


@pytest.fixture
def scripted(tmp_path: Path) -> Iterator[Client]:
    """`python streamer.py --test-mode`."""
    with process(SERVER, "--test-mode", "--port", "0", cwd=tmp_path) as server:
        yield server.client


def needs(tool: str) -> str:
    """The path of a program some tests need: skips without it, but in CI its absence is a failure."""
    path = shutil.which(tool)
    if path is None and os.environ.get("CI"):
        pytest.fail(f"{tool} is not installed, and CI must have it")
    if path is None:
        pytest.skip(f"{tool} is not installed")
    return path


class Gate:
    """A runner that emits, waits for the test, emits, returns."""

    def __init__(self) -> None:
        self.started, self.go = threading.Event(), threading.Event()
        self.runs = 0

    def __call__(self, run: Run) -> dict[str, Any]:
        self.runs += 1
        run.emit("MESSAGE", {"message": "before"}, "Engineer")
        self.started.set()
        while not self.go.is_set():
            run.wait(0.01)
        run.emit("MESSAGE", {"message": "after"}, "Engineer")
        return {"answer": 42}


def burst(count: int) -> Callable[[Run], dict[str, Any]]:
    def runner(run: Run) -> dict[str, Any]:
        for number in range(count):
            run.emit("LOG", {"message": f"line {number}"})
        return {}

    return runner


# -----------------------------------------------------------------------------
# The lock
# -----------------------------------------------------------------------------

# What metagpt 0.8.2 asks for and the lock leaves out or overrides: optional vendors, and pins that cannot be met.
OVERRIDDEN = "metagpt"


def locked() -> dict[str, str]:
    lines = (HERE / "requirements.txt").read_text().splitlines()
    pins = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {str(canonicalize_name(name)): version for name, version in pins}


def test_lock_is_complete() -> None:
    """Every requirement of every locked package is met by the lock, but for MetaGPT's own pins."""
    pins, unmet = locked(), []
    for name in pins:
        if name == OVERRIDDEN:
            continue
        for text in importlib.metadata.requires(name) or []:
            wanted = Requirement(text)
            if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
                continue
            version = pins.get(str(canonicalize_name(wanted.name)))
            if version is None or not wanted.specifier.contains(version, prereleases=True):
                unmet.append(f"{name} needs {text}, the lock has {version}")
    assert unmet == []


def test_lock_is_what_is_installed() -> None:
    """These tests run on the versions of the lock."""
    assert {name: importlib.metadata.version(name) for name in locked()} == locked()


# -----------------------------------------------------------------------------
# Settings
# -----------------------------------------------------------------------------


def test_settings_flags_win_over_the_environment() -> None:
    """A flag beats a variable, a variable beats the default."""
    environ = {"STREAMER_PORT": "1", "STREAMER_TEST_MODE": "yes", "STREAMER_HEARTBEAT": "2.5"}
    settings = Settings.from_environ(environ, port="2", heartbeat=None)
    assert (settings.port, settings.test_mode, settings.heartbeat, settings.max_running) == (2, True, 2.5, 4)
    assert settings.workspace == Path.cwd() / "workspace"


@pytest.mark.parametrize(
    ("variable", "text", "complaint"),
    [
        ("STREAMER_PORT", "http", "STREAMER_PORT must be a whole number, not 'http'"),
        ("STREAMER_PORT", "70000", "port must be at most 65535, not 70000"),
        ("STREAMER_PORT", "-1", "port must be a number of at least 0, not -1"),
        ("STREAMER_HEARTBEAT", "soon", "STREAMER_HEARTBEAT must be a number, not 'soon'"),
        ("STREAMER_HEARTBEAT", "nan", "heartbeat must be a number of at least 0.05, not nan"),
        ("STREAMER_GRACE", "inf", "grace must be a number of at least 0, not inf"),
        ("STREAMER_MAX_RUNNING", "0", "max_running must be a number of at least 1, not 0"),
        ("STREAMER_TEST_MODE", "maybe", "STREAMER_TEST_MODE must be true or false, not 'maybe'"),
        ("STREAMER_HOST", "0.0.0.0", "host must be a loopback address such as 127.0.0.1, not '0.0.0.0'"),
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
        ({"message": "m", "n": math.nan, "i": -math.inf}, {"message": "m", "n": "nan", "i": "-inf"}),
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


@pytest.mark.parametrize("payload", [cycle(), {"message": "m", "n": 10**6000}, {"message": [[[]]] * 3, "s": Settings}])
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


def task(status: TaskStatus = TaskStatus.PENDING) -> streamer.Task:
    return streamer.Task(id="t", title="t", input_prompt="p", mode="test", options={}, status=status)


def test_transitions_outside_the_table_raise() -> None:
    """Of the 25 pairs of states just the eight of the table are allowed."""
    allowed = set()
    for before, after in itertools.product(TaskStatus, TaskStatus):
        with contextlib.suppress(streamer.IllegalTransition):
            allowed.add((before.value, task(before).to(after).status.value))
    ends = {("PENDING", "RUNNING"), ("PENDING", "FAILED"), ("PENDING", "CANCELLED")}
    ends |= {("RUNNING", end) for end in ("SUCCEEDED", "FAILED", "CANCELLED")}
    assert allowed == ends | {("FAILED", "PENDING"), ("CANCELLED", "PENDING")}


# -----------------------------------------------------------------------------
# Store and broker
# -----------------------------------------------------------------------------


def draft(number: int, kind: EventType = EventType.LOG) -> streamer.Draft:
    return streamer.Draft(kind, None, streamer.now(), f"m{number}", f'{{"message":"m{number}"}}')


async def new_broker(**settings: Any) -> streamer.Broker:
    chosen = Settings(**settings)
    store = streamer.MemoryStore(chosen)
    state = streamer.TaskState(task_id="t")
    await store.save(task(), state)
    return streamer.Broker(task(), state, 1, store, chosen)


async def collect(subscription: streamer.Subscription) -> list[int]:
    found: list[int] = []
    try:
        async for events, _ in subscription:
            found += [event.event_id for event in events]
    finally:
        subscription.close()
    return found


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.mark.anyio
@pytest.mark.parametrize("buffer", [1, 3, 256])
async def test_broker_replay_meets_live_without_a_seam(buffer: int) -> None:
    """Clients that come before, amid and after a burst, at any cursor, see each event once, in order."""
    broker = await new_broker(subscriber_buffer=buffer)
    found: dict[int, list[int]] = {}

    async def client(after: int) -> None:
        found[after] = await collect(broker.subscribe(after))

    async with anyio.create_task_group() as group:
        for batch in range(10):
            group.start_soon(client, batch * 7)
            for number in range(7):
                await broker.publish([draft(number)])
            await anyio.lowlevel.checkpoint()
        broker.end()
    assert found == {after: list(range(after + 1, 71)) for after in range(0, 70, 7)}


@pytest.mark.anyio
async def test_broker_feeds_a_slow_client_from_the_log() -> None:
    """A client that does not read costs its buffer, and later gets everything from the log."""
    broker = await new_broker(subscriber_buffer=4)
    slow = broker.subscribe()
    for number in range(1000):
        await broker.publish([draft(number)])
    assert slow._receive.statistics().current_buffer_used <= 5
    broker.end()
    assert await collect(slow) == list(range(1, 1001))


@pytest.mark.anyio
async def test_broker_tells_a_client_that_retention_overtook_it() -> None:
    """Events dropped before a client read them are not skipped in silence."""
    broker = await new_broker(max_events=10, subscriber_buffer=1)
    slow = broker.subscribe()
    for number in range(100):
        await broker.publish([draft(number)])
    with pytest.raises(streamer.SlowClient, match=r"events 2 to 90 were dropped .* after=1"):
        await collect(slow)


@pytest.mark.anyio
async def test_broker_state_follows_its_events_and_ends_the_stream() -> None:
    """State comes first, after events that changed it, and terminal last."""
    broker = await new_broker()
    subscription = broker.subscribe()
    await broker.publish([draft(1, EventType.AGENT_START)], progress=0.5)
    await broker.publish([draft(2, EventType.TASK_COMPLETE)], status=TaskStatus.SUCCEEDED, progress=0.2)
    broker.end()
    seen = []
    async for events, state in subscription:
        seen += [event.event_type.value for event in events]
        seen += [json.loads(state)["data"]["status"]] if state else []
    subscription.close()
    assert seen == ["SUCCEEDED", "AGENT_START", "TASK_COMPLETE", "SUCCEEDED"]
    assert broker.state.progress == 0.5


@pytest.mark.anyio
async def test_store_forgets_the_oldest_ended_tasks() -> None:
    """Beyond max_tasks the oldest ended tasks go; tasks that have not ended never do."""
    store = streamer.MemoryStore(Settings(max_tasks=2))
    state = streamer.TaskState(task_id="x")
    records = [streamer.Task(id=name, title=name, input_prompt="p", mode="test", options={}) for name in "abcd"]
    await store.save(records[0], state)
    await store.save(records[1], state)
    with pytest.raises(streamer.TooManyTasks):
        await store.save(records[2], state)
    await store.save(records[0].to(TaskStatus.CANCELLED), state)
    assert await store.save(records[2], state) == ["a"]
    assert [each.id for each in (await store.page(None, 0, 10))[0]] == ["c", "b"]


@pytest.mark.anyio
async def test_run_is_held_back_while_the_loop_is_behind(tmp_path: Path) -> None:
    """A runner faster than the loop waits at `emit`; what waits for the loop stays bounded."""
    run = Run(task(), Settings(workspace=tmp_path))
    emitted = 0

    def flood() -> None:
        nonlocal emitted
        for _ in range(3 * run.MAX_ITEMS):
            run.emit("LOG")
            emitted += 1

    thread = threading.Thread(target=flood)
    thread.start()
    taken = 0
    while taken < 3 * run.MAX_ITEMS:
        taken += len(await run.take())
        assert emitted - taken <= run.MAX_ITEMS + 1
    thread.join(TIMEOUT)
    run.finish()
    assert await run.take() == []
    run.emit("LOG")  # goes nowhere, and does not wait
    assert await run.take() == []


# -----------------------------------------------------------------------------
# Runners
# -----------------------------------------------------------------------------


def test_scripted_team_plays_a_whole_run(scripted: Client) -> None:
    """Test mode: the real team's roles, event types and states, labelled as a test everywhere."""
    task_id = scripted.create("Build a <b>todo</b> app", options={"run_tests": True})
    record = scripted.watch(task_id)
    assert record.close_code == 1000
    assert [message["type"] for message in record.messages[:2]] == ["connected", "state"]
    assert record.ids == list(range(1, len(record.ids) + 1))
    roles = ["ProductManager", "Architect", "ProjectManager", "Engineer", "QaEngineer"]
    assert [event["agent_role"] for event in record.of("AGENT_START")] == roles
    assert {event["event_type"] for event in record.events} == WHOLE_RUN
    assert record.events[-1]["event_type"] == "TASK_COMPLETE"
    assert record.messages[-1]["type"] == "state"
    progress = [state["progress"] for state in record.data("state")]
    assert progress == sorted(progress)
    assert (progress[0], progress[-1]) == (0.0, 1.0)
    assert any(state.get("waiting_on", {}).get("agent_role") == "Architect" for state in record.data("state"))
    assert record.last_state["status"] == "SUCCEEDED"
    assert record.last_state["final_result"]["mode"] == "test"
    assert record.data("connected")[0]["mode"] == scripted.get(f"/api/tasks/{task_id}")["mode"] == "test"
    files = scripted.get(f"/api/tasks/{task_id}/artifacts")
    assert [file["path"] for file in files] == record.last_state["final_result"]["files"]
    prd = scripted.http.get(f"/api/tasks/{task_id}/artifacts/docs/prd.md")
    assert "Request: Build a <b>todo</b> app" in prd.text
    assert prd.headers["content-type"] == "text/plain; charset=utf-8"


def test_scripted_team_does_not_import_metagpt(tmp_path: Path) -> None:
    """Test mode needs neither MetaGPT nor what it brings, and importing streamer starts nothing."""
    code = """
import sys, threading, anyio, streamer
settings = streamer.Settings(test_mode=True)
app = streamer.create_app(settings)
async def one():
    async with app.state.supervisor.open():
        task, _ = await app.state.supervisor.submit("p", "t", streamer.parse_options({"implement": False}, 60))
        async with app.state.supervisor.watch(task.id) as subscription:
            await app.state.supervisor.start(task.id)
            return [event.event_type async for events, _ in subscription for event in events]
assert anyio.run(one)[-1] == "TASK_COMPLETE"
assert not {"metagpt", "openai", "loguru", "pydantic", "yaml", "numpy"} & set(sys.modules), "imported"
"""
    with process("-c", code, cwd=tmp_path) as script:
        assert script.wait() == 0, "".join(script.errors)


def test_metagpt_runs_the_whole_company(metagpt: tuple[Client, ModelServer, Process]) -> None:
    """PRD, design, tasks, code and reviews, token by token, by the real engine; files, cost and progress reported."""
    client, model, server = metagpt
    task_id = client.create("Build a todo application with React [mark=whole]")
    record = client.watch(task_id)
    assert record.last_state["status"] == "SUCCEEDED", record.last_state
    assert record.last_state["final_result"]["end_reason"] == "idle"
    assert record.ids == list(range(1, len(record.ids) + 1))
    assert {event["event_type"] for event in record.events} == WHOLE_RUN
    spoken = {(event["agent_role"], event["payload"]["action"]) for event in record.of("TOKEN")}
    assert spoken == {
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
    assert sum("[CONTENT]" in text and "[/CONTENT]" in text for text in calls.values()) == 3
    files = {file["path"]: file["size"] for file in client.get(f"/api/tasks/{task_id}/artifacts")}
    written = {event["payload"]["path"]: event["payload"]["size"] for event in record.of("ARTIFACT")}
    assert files == written
    assert {"game.py", "main.py"} <= {path.rsplit("/", 1)[-1] for path in files}
    assert any(path.endswith(".mmd") for path in files)
    states = record.data("state")
    assert {0.2, 0.4, 0.5, 0.7, 0.9, 1.0} <= {state["progress"] for state in states}
    assert any(state.get("waiting_on", {}).get("action") == "WriteDesign" for state in states)
    used = model.usage["whole"]
    cost = record.last_state["cost"]
    assert (cost["prompt_tokens"], cost["completion_tokens"]) == (used["prompt_tokens"], used["completion_tokens"])
    assert 0 < cost["total_cost"] < cost["max_budget"] == 3.0
    assert (server.output, [line for line in server.errors if " INFO streamer " not in line]) == (b"", [])


def test_metagpt_writes_only_below_its_workspace(metagpt: tuple[Client, ModelServer, Process]) -> None:
    """Nothing appears beside the workspace: no configuration, no log, no project."""
    client, _, server = metagpt
    client.watch(client.create("[mark=inside]", options={"implement": False}))
    folder = Path(os.readlink(f"/proc/{server.popen.pid}/cwd"))
    assert [path.name for path in folder.iterdir()] == ["workspace"]
    tasks = {each["id"] for each in client.get("/api/tasks?page_size=100")["items"]}
    assert {path.name for path in (folder / "workspace").iterdir()} <= tasks | {".metagpt"}


FAILURES: list[tuple[str, dict[str, Any], str, str]] = [
    ("[401]", {}, "FAILED", r"ProductManager failed in WritePRD: .* rejected the key \(401\): check OPENAI_API_KEY"),
    ("[404]", {}, "FAILED", r"has no model 'gpt-4o' \(404\): check OPENAI_MODEL"),
    ("[garbage]", {}, "FAILED", r"ProductManager failed in WritePRD: .*, after 6 attempts; a stronger model"),
    ("[garbage once]", {}, "SUCCEEDED", r"idle"),
    ("[503 once]", {}, "SUCCEEDED", r"idle"),
    ("[no usage]", {}, "SUCCEEDED", r"idle"),
    ("", {"investment": 0.001}, "FAILED", r"the budget is spent: \$0\.0\d+ of \$0\.001"),
    ("", {"n_round": 2}, "SUCCEEDED", r"rounds"),
    ("[slow]", {"timeout": 2}, "FAILED", r"^timed out after 2 s \(options\.timeout\)$"),
    ("[task=.]", {}, "FAILED", r"Engineer failed in WriteCode.*: IsADirectoryError"),
    ("[task=../../../../escaped.py]", {}, "FAILED", r"the model named a file outside the task's workspace"),
    ("[task=/etc/hostname]", {}, "FAILED", r"the model named a file outside the task's workspace"),
    ("", {"run_tests": True, "n_round": 8}, "SUCCEEDED", r"idle|rounds"),
]


def test_metagpt_failures_end_with_a_reason(metagpt: tuple[Client, ModelServer, Process]) -> None:
    """Each way to fail ends in the right status, with a reason a person can act on, and no key anywhere."""
    client, model, server = metagpt

    def run(number: int) -> Record:
        prompt, options, _, _ = FAILURES[number]
        return client.watch(client.create(f"[mark=fail{number}] {prompt}", options=options))

    with ThreadPoolExecutor(len(FAILURES)) as pool:
        records = list(pool.map(run, range(len(FAILURES))))
    model.slow.set()
    model.slow.clear()
    for (prompt, options, status, reason), record in zip(FAILURES, records, strict=True):
        state = record.last_state
        assert state["status"] == status, (prompt, options, state)
        assert re.search(reason, state["error_message"] or state["final_result"]["end_reason"]), (prompt, state)
        assert sum(event["event_type"] in TERMINAL for event in record.events) == 1
        assert record.events[-1]["event_type"] == ("TASK_COMPLETE" if status == "SUCCEEDED" else "TASK_ERROR")
        assert KEY not in json.dumps(record.messages)
    assert KEY not in "".join(server.errors)
    assert len(model.requests["fail0"]) == 1  # a rejected key is not tried again
    assert len(model.requests["fail2"]) == 6
    retried = [event for event in records[4].of("LOG", "TOKEN") if event["payload"].get("level") in ("WARNING", None)]
    assert "answered 503: " in retried[0]["payload"]["message"]  # before the attempt that succeeds
    assert records[5].last_state["cost"]["completion_tokens"] > 0  # estimated
    assert not (Path("/etc") / "escaped.py").exists()
    roles = {event["agent_role"] for event in records[12].of("AGENT_START")}
    assert "QaEngineer" in roles


def test_metagpt_server_that_is_down_is_said_at_once(tmp_path: Path) -> None:
    """Every failed attempt is a LOG when it fails; after five the task is FAILED and says where it knocked."""
    with loopback() as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/v1"
        environ = {"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": url, "OPENAI_MODEL": "some-model"}
        with process(SERVER, "--port", "0", cwd=tmp_path, environ=environ) as server:
            client = server.client
            record = client.watch(client.create())
    attempts = [event for event in record.of("LOG") if event["payload"]["level"] == "WARNING"]
    numbers = [re.findall(r"attempt (\d) of 5", event["payload"]["message"]) for event in attempts]
    assert [number for found in numbers for number in found] == ["1", "2", "3", "4"]
    assert len({event["timestamp"][:19] for event in attempts}) == 4  # each when it happened
    assert f"the model API at {url} cannot be reached" in record.last_state["error_message"]


def test_metagpt_isolates_concurrent_tasks(metagpt: tuple[Client, ModelServer, Process]) -> None:
    """Eight teams at once, each answer needing a retry: no marker, file, prompt, cost or client crosses."""
    client, model, _ = metagpt
    marks = [f"iso{number}" for number in range(8)]

    def run(mark: str) -> tuple[str, Record]:
        task_id = client.create(f"Build [mark={mark}] [garbage once]")
        return task_id, client.watch(task_id)

    with ThreadPoolExecutor(len(marks)) as pool:
        results = dict(zip(marks, pool.map(run, marks), strict=True))
    for mark, (task_id, record) in results.items():
        assert record.last_state["status"] == "SUCCEEDED", record.last_state
        foreign = [f"[mark={other}]" for other in marks if other != mark]
        texts = [json.dumps(record.messages), *model.requests[mark]]
        texts += [client.http.get(f"/api/tasks/{task_id}/artifacts/{file['path']}").text
                  for file in client.get(f"/api/tasks/{task_id}/artifacts")]
        assert not [(name, text[:80]) for name in foreign for text in texts if name in text]
        assert sum(f"[mark={mark}]" in text for text in texts) > 10
        used, cost = model.usage[mark], record.last_state["cost"]
        assert (cost["prompt_tokens"], cost["completion_tokens"]) == (used["prompt_tokens"], used["completion_tokens"])
    assert [marks for marks in model.ports.values() if len(marks) > 1] == []  # one client, one task


def test_metagpt_cancel_during_a_model_call(metagpt: tuple[Client, ModelServer, Process]) -> None:
    """A cancel ends a run that waits for its model; no model call starts after it."""
    client, model, _ = metagpt
    model.asked.clear()
    task_id = client.create("[mark=stop] [slow]")
    with client.socket(task_id) as websocket:
        receive_until(websocket, lambda message: "waiting_on" in message["data"])
        assert model.asked.wait(TIMEOUT)
        websocket.send('{"type": "cancel"}')
        record = Record(websocket)
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


SYNC_FILE_OPERATION = """
import sys, time
import streamer
settings = streamer.Settings.from_environ(port="0", grace="2")
engine = streamer.load_metagpt(settings.workspace)
add = engine.GitRepository.archive
def archive(self, *args):
    print("archiving", flush=True)
    time.sleep(float(sys.argv[1]))  # a file operation: nothing can interrupt it
    return add(self, *args)
engine.GitRepository.archive = archive
streamer.logging.basicConfig(level="INFO")
streamer.serve(streamer.create_app(settings), settings)
"""


@pytest.mark.parametrize(("seconds", "abandoned"), [(1, False), (5, True)])
def test_metagpt_cancel_during_a_file_operation(tmp_path: Path, seconds: int, abandoned: bool) -> None:
    """A thread in a synchronous operation is waited for, for `grace` seconds; then it is abandoned, and said so."""
    with model_server() as (_, url):
        environ = {"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": url}
        with process("-c", SYNC_FILE_OPERATION, str(seconds), cwd=tmp_path, environ=environ) as server:
            client = server.client
            task_id = client.create("[mark=file]")
            with client.socket(task_id) as websocket:
                receive_until(websocket, lambda message: "Edward" in str(message["data"].get("payload")))
                receive_until(websocket, is_event("LOG"))
                client.post(f"/api/tasks/{task_id}/cancel")
                record = Record(websocket)
            assert record.last_state["status"] == "CANCELLED"
            assert ("was abandoned" in record.events[-1]["payload"]["message"]) is abandoned
            assert client.get("/healthz")["abandoned"] == abandoned


def test_metagpt_loads_while_the_server_answers(tmp_path: Path) -> None:
    """A task posted at once waits in PENDING and says that MetaGPT is loading; the server answers meanwhile."""
    with model_server() as (_, url):
        environ = {"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": url}
        with process(SERVER, "--port", "0", cwd=tmp_path, environ=environ) as server:
            client = server.client
            assert client.get("/healthz")["engine"] == "loading"
            record = client.watch(client.create(options={"implement": False}))
    waiting = [state for state in record.data("state") if state["last_message"] == "loading MetaGPT"]
    assert [state["status"] for state in waiting] == ["PENDING"]
    assert record.last_state["status"] == "SUCCEEDED"


def test_metagpt_takes_its_own_configuration_file(tmp_path: Path) -> None:
    """~/.metagpt/config2.yaml is enough, and nothing is written to it or beside it."""
    with model_server() as (model, url):
        folder = tmp_path / ".metagpt"
        folder.mkdir()
        text = f"llm:\n  api_type: openai\n  model: from-the-file\n  base_url: {url}\n  api_key: {KEY}\n"
        (folder / "config2.yaml").write_text(text)
        with process(SERVER, "--port", "0", cwd=tmp_path) as server:
            client = server.client
            record = client.watch(client.create("[mark=file] [404]"))
        assert "has no model 'from-the-file'" in record.last_state["error_message"]
        assert len(model.requests["file"]) == 1
        assert [path.name for path in folder.iterdir()] == ["config2.yaml"]
        assert (folder / "config2.yaml").read_text() == text


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
    """Starting a running task does nothing; an ended one is 409, and only restart runs a CANCELLED one again."""
    gate = Gate()
    with live(gate, tmp_path) as client:
        task_id = client.create()
        assert [client.post(f"/api/tasks/{task_id}/run").status_code for _ in range(3)] == [202, 202, 202]
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
    assert (gate.runs, second.last_state["status"], second.last_state["progress"]) == (2, "SUCCEEDED", 1.0)


def test_cancel_before_the_start_and_while_waiting_for_a_slot(tmp_path: Path) -> None:
    """Neither task's runner is ever called; both end CANCELLED, and the slot stays with who has it."""
    gate = Gate()
    with live(gate, tmp_path, max_running=1) as client:
        running, waiting, unstarted = client.create(), client.create(), client.create()
        client.post(f"/api/tasks/{running}/run")
        assert gate.started.wait(TIMEOUT)
        with client.socket(waiting) as websocket:
            receive_until(websocket, lambda message: "waiting for a free slot" in str(message))
            for task_id in (waiting, unstarted):
                assert client.post(f"/api/tasks/{task_id}/cancel").status_code == 202
            record = Record(websocket)
        assert [event["event_type"] for event in record.events] == ["TASK_CANCELLED"]
        assert [event["event_type"] for event in client.watch(unstarted).events] == ["TASK_CANCELLED"]
        gate.go.set()
        assert client.watch(running).last_state["status"] == "SUCCEEDED"
        assert gate.runs == 1
        assert client.get("/api/tasks?status=CANCELLED")["total"] == 2


@pytest.mark.anyio
async def test_cancel_races_success(tmp_path: Path) -> None:
    """200 times: an acknowledged cancel is never overwritten by a success, a refused one never hides it."""
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
                kinds = [event.event_type async for events, _ in subscription for event in events]
            assert [kind for kind in kinds if kind in TERMINAL] == [expected]
            ends[expected] += 1
    assert set(ends) == {"TASK_CANCELLED", "TASK_COMPLETE"}


def test_abandoned_thread_is_reported_and_unheard(tmp_path: Path) -> None:
    """A runner deaf to its cancel is abandoned after `grace`; what it emits later goes nowhere."""
    release, ended = threading.Event(), threading.Event()

    def deaf(run: Run) -> None:
        run.emit("LOG", {"message": "heard"})
        release.wait(TIMEOUT)
        run.emit("LOG", {"message": "unheard"})
        ended.set()

    with live(deaf, tmp_path, grace=0.2) as client:
        task_id = client.create()
        with client.socket(task_id) as websocket:
            receive_until(websocket, is_event("LOG"))
            websocket.send('{"type": "cancel"}')
            record = Record(websocket)
        release.set()
        assert ended.wait(TIMEOUT)
        assert "did not stop within 0.2 s and was abandoned" in record.events[-1]["payload"]["message"]
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
def test_runner_that_fails_is_failed_with_its_reason(tmp_path: Path, result: Any, reason: str) -> None:
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


def test_delete_stops_forgets_and_tells(tmp_path: Path) -> None:
    """A deleted task is cancelled, its files go, its clients get 4404."""
    gate = Gate()
    with live(gate, tmp_path) as client:
        task_id = client.create()
        (tmp_path / task_id).mkdir()
        with client.socket(task_id, "start=false") as idle:
            receive_until(idle, lambda message: message["type"] == "state")
            assert client.http.delete(f"/api/tasks/{task_id}").status_code == 204
            gone = Record(idle)
        assert gone.messages[-1]["data"]["code"] == "task_not_found"
        assert gone.close_code == 4404
        assert client.http.get(f"/api/tasks/{task_id}").status_code == 404
        assert list(tmp_path.iterdir()) == []
        running = client.create()
        client.post(f"/api/tasks/{running}/run")
        assert gate.started.wait(TIMEOUT)
        assert client.http.delete(f"/api/tasks/{running}").status_code == 204
        assert client.get("/api/tasks")["total"] == 0


def test_limits_of_tasks_and_clients(tmp_path: Path) -> None:
    """More than max_waiting: 429 with Retry-After, and 1013 on a socket; more than max_sockets: 503 and 1013."""
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
        with client.socket(tasks[0], "types=ERROR") as one, client.socket(tasks[1], "types=ERROR") as two:
            for websocket in (one, two):
                receive_until(websocket, lambda message: message["type"] == "state")
            third = client.watch(tasks[2])
            assert (third.messages[0]["data"]["code"], third.close_code) == ("too_many_clients", 1013)
            stream = client.http.get(f"/api/tasks/{tasks[2]}/events", headers={"Accept": "text/event-stream"})
            assert (stream.status_code, stream.headers["retry-after"]) == (503, "5")
        gate.go.set()


# -----------------------------------------------------------------------------
# Routes
# -----------------------------------------------------------------------------

JSON = {"Content-Type": "application/json"}
BAD_REQUESTS: list[tuple[str, dict[str, str], bytes, int, str]] = [
    ("/api/tasks", {}, b'{"input_prompt": "x"}', 415, "Content-Type must be application/json, not ''"),
    ("/api/tasks", {"Content-Type": "text/plain"}, b"{}", 415, "not 'text/plain'"),
    ("/api/tasks", JSON, b"", 400, "the body must be JSON"),
    ("/api/tasks", JSON, b"{", 400, "the body must be JSON"),
    ("/api/tasks", JSON, b"\xff\xfe", 400, "the body must be JSON"),
    ("/api/tasks", JSON, b"[" * 60_000, 400, "the body must be JSON"),
    ("/api/tasks", JSON, b'{"input_prompt": NaN}', 400, "NaN is not JSON"),
    ("/api/tasks", JSON, b'{"n": ' + b"9" * 5000 + b"}", 400, "the body must be JSON"),
    ("/api/tasks", JSON, b"[]", 400, "the body must be an object, not an array"),
    ("/api/tasks", JSON, b"null", 400, "the body must be an object, not null"),
    ("/api/tasks", JSON, b"{}", 400, "input_prompt is missing"),
    ("/api/tasks", JSON, b'{"input_prompt": 7}', 400, "input_prompt must be a string, not the number 7"),
    ("/api/tasks", JSON, b'{"input_prompt": " \\n"}', 400, "input_prompt must be 1 to 100 characters"),
    ("/api/tasks", JSON, b'{"input_prompt": "' + b"x" * 101 + b'"}', 400, "it has 101"),
    ("/api/tasks", JSON, b'{"input_prompt": "' + b"x" * 100_000 + b'"}', 413, "the body must be at most"),
    ("/api/tasks", JSON, b'{"input_prompt": "\\ud800"}', 400, "input_prompt must be Unicode text"),
    ("/api/tasks", JSON, b'{"input_prompt": "x", "title": null}', 400, "title must be a string, not null"),
    ("/api/tasks", JSON, b'{"input_prompt": "x", "Title": "y"}', 400, "'Title' is unknown"),
    ("/api/tasks", JSON, b'{"input_prompt": "x", "options": []}', 400, "options must be an object, not an array"),
    ("/api/tasks", JSON, b'{"input_prompt": "x", "options": {"n": 1}}', 400, "options.n is unknown"),
    ("/api/tasks", JSON, b'{"input_prompt": "x", "options": {"n_round": 51}}', 400, "options.n_round must be a whole"),
    ("/api/tasks", JSON, b'{"input_prompt": "x", "options": {"n_round": true}}', 400, "not the boolean true"),
    ("/api/tasks", JSON, b'{"input_prompt": "x", "options": {"investment": 0}}', 400, "options.investment must be"),
    ("/api/tasks", JSON, b'{"input_prompt": "x", "options": {"implement": 1}}', 400, "options.implement must be"),
    ("/api/tasks", JSON, b'{"input_prompt": "x", "options": {"project_name": "../x"}}', 400, "options.project_name"),
    ("/api/tasks", JSON, b'{"input_prompt": "x", "options": {"timeout": 1e99}}', 400, "options.timeout must be"),
    ("/api/tasks", JSON, b'{"input_prompt": "x", "options": {"timeout": 9999}}', 400, "must be at most 3600 s"),
    ("/api/tasks", {**JSON, "Idempotency-Key": "k" * 256}, b'{"input_prompt": "x"}', 400, "Idempotency-Key must be"),
    ("/api/tasks/nope/run", JSON, b"", 404, "task 'nope' not found"),
    ("/api/tasks/nope/cancel", JSON, b"", 404, "task 'nope' not found"),
    ("/api/tasks/" + "x" * 500 + "/run", JSON, b"", 404, "not found"),
    ("/api/tasks/%00%ff%0a/run", JSON, b"", 404, "not found"),
    ("/api/task", JSON, b"", 404, "POST '/api/task': Not Found"),
    ("/api/tasks/nope", JSON, b"", 405, "Method Not Allowed"),
]


def test_bad_requests_name_what_is_wrong_and_create_nothing(tmp_path: Path) -> None:
    """Every malformed request gets its 4xx with a code and a message; the list of tasks stays empty."""
    with live(burst(1), tmp_path, max_prompt=100) as client:
        for path, headers, body, status, message in BAD_REQUESTS:
            response = client.http.post(path, headers=headers, content=body)
            error = response.json()["error"]
            assert (response.status_code, set(error)) == (status, {"code", "message"}), (body[:60], response.text)
            assert message in error["message"], (body[:60], error)
        assert client.get("/api/tasks") == {"items": [], "total": 0, "page": 1, "page_size": 10, "total_pages": 0}


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


def test_body_that_never_comes_times_out(tmp_path: Path) -> None:
    """A client that announces a body and does not send it gets 408 after send_timeout."""
    with live(burst(1), tmp_path, send_timeout=0.2) as client:
        port = int(client.url.rsplit(":", 1)[1])
        with socket.create_connection(("127.0.0.1", port), TIMEOUT) as raw:
            head = b"POST /api/tasks HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            raw.sendall(head + b"Content-Length: 9\r\n\r\n{")
            assert raw.recv(65536).startswith(b"HTTP/1.1 408")


def test_create_is_idempotent_by_key(tmp_path: Path) -> None:
    """The same key gives the same task, another request under it is 422."""
    with live(burst(1), tmp_path) as client:
        bodies = [{"input_prompt": "a"}, {"input_prompt": "a"}, {"input_prompt": "b"}]
        answers = [client.http.post("/api/tasks", json=body, headers={"Idempotency-Key": "k1"}) for body in bodies]
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
        assert [(page["total"], page["page"], page["page_size"], page["total_pages"]) for page in pages] == [
            (25, page, 10, 3) for page in (1, 2, 3, 4)
        ]
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
    """connected, state, then what was asked for; ping, cancel; anything else is an error and the stream goes on."""
    gate = Gate()
    with live(gate, tmp_path) as client, client.socket(task_id := client.create()) as websocket:
        connected = json.loads(websocket.recv(timeout=TIMEOUT))
        assert connected == {
            "type": "connected",
            "data": {
                "task_id": task_id,
                "message": "watching 'Build a todo app' (test mode: a scripted team)",
                "mode": "test",
                "status": "PENDING",
                "first_event_id": 1,
                "last_event_id": 0,
                "recovered": True,
            },
        }
        state = json.loads(websocket.recv(timeout=TIMEOUT))
        assert (state["type"], state["data"]["status"], state["data"]["last_event_id"]) == ("state", "PENDING", 0)
        receive_until(websocket, is_event("MESSAGE"))
        malformed: list[str | bytes] = ["", "x", "[]", "{}", '{"type": "dance"}', "[" * 60000, b"\x00\x01"]
        for bad in malformed:
            websocket.send(bad)
            error = receive_until(websocket, lambda message: message["type"] == "error")
            assert error["data"]["code"] == "invalid_request"
            assert 'expected {"type": "ping"}' in error["data"]["message"]
        websocket.send('{"type": "ping"}')
        assert receive_until(websocket, lambda message: message["type"] == "pong")
        gate.go.set()
        record = Record(websocket)
        assert record.close_code == 1000
        assert record.events[-1] == {**record.events[-1], "event_type": "TASK_COMPLETE", "event_id": 5}
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
def test_socket_refusals_are_readable(tmp_path: Path, task: str, query: str, code: int, message: str) -> None:
    """A refusal is an `error` message and a close code, never a failed handshake."""
    with live(burst(1), tmp_path) as client:
        record = client.watch(task.replace("ID", client.create()), query)
    assert [each["type"] for each in record.messages] == ["error"]
    assert message in record.messages[0]["data"]["message"]
    assert record.close_code == code


def test_socket_can_only_watch_filter_and_resume(tmp_path: Path) -> None:
    """start=false starts nothing, types= leaves out, after= resumes, a cursor from elsewhere is not recovered."""
    with live(burst(5), tmp_path, heartbeat=0.05) as client:
        task_id = client.create()
        with client.socket(task_id, "start=false") as websocket:
            states = [receive_until(websocket, lambda message: message["type"] == "state") for _ in range(3)]
            assert {state["data"]["status"] for state in states} == {"PENDING"}
        assert client.watch(task_id, "types=RESULT,TASK_COMPLETE").ids == [7, 8]
        resumed = client.watch(task_id, "after=6")
        assert (resumed.ids, resumed.data("connected")[0]["recovered"]) == ([7, 8], True)
        lost = client.watch(task_id, "after=5000")
        assert (lost.ids, lost.data("connected")[0]["recovered"]) == (list(range(1, 9)), False)
        end = client.watch(task_id, "after=8")
        assert [message["type"] for message in end.messages] == ["connected", "state"]


def test_state_is_sent_in_silence_and_says_who_waits(tmp_path: Path) -> None:
    """At least every `heartbeat` seconds a state comes, with how long an agent has waited for its model."""
    go = threading.Event()

    def runner(run: Run) -> None:
        run.update(progress=0.7)
        run.waits_for_model("Architect", "WriteDesign")
        run.update(progress=0.2)
        while not go.is_set():
            run.wait(0.01)

    with live(runner, tmp_path, heartbeat=0.1) as client, client.socket(client.create()) as websocket:
        waits = [receive_until(websocket, lambda message: "waiting_on" in message["data"])["data"] for _ in range(4)]
        assert {(wait["waiting_on"]["agent_role"], wait["waiting_on"]["action"]) for wait in waits} == {
            ("Architect", "WriteDesign")
        }
        assert waits[-1]["waiting_on"]["seconds"] > waits[0]["waiting_on"]["seconds"]
        assert {wait["progress"] for wait in waits} == {0.7}
        go.set()
        assert "waiting_on" not in Record(websocket).last_state


def test_slow_client_is_closed_and_delays_nobody(tmp_path: Path) -> None:
    """A client that never reads is let go with 1013 after send_timeout; run and readers are done long before."""
    with live(burst(20_000), tmp_path, send_timeout=1.0, max_events=20_010) as client:
        task_id = client.create()
        port = int(client.url.rsplit(":", 1)[1])
        raw = socket.socket()
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.connect(("127.0.0.1", port))
        with raw:
            head = f"GET /ws/tasks/{task_id}?start=false HTTP/1.1\r\nHost: x\r\n"
            head += "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
            raw.sendall(f"{head}Sec-WebSocket-Key: {'A' * 22}==\r\n\r\n".encode())
            record = client.watch(task_id)
            assert record.ids == list(range(1, 20_004))
            with client.socket(client.create(), "start=false") as other:
                receive_until(other, lambda message: message["type"] == "state")
                text = client.http.get("/metrics").text
                while "streamer_slow_clients_total 1" not in text:
                    text = client.http.get("/metrics").text


def test_sse_is_the_sockets_twin(tmp_path: Path) -> None:
    """The same messages; ids on events; resumes by Last-Event-ID; 204 when there is nothing more to come."""
    with live(burst(5), tmp_path) as client:
        task_id = client.create()
        over_socket = client.watch(task_id).messages
        path, accept = f"/api/tasks/{task_id}/events", {"Accept": "text/event-stream"}
        response = client.http.get(path, headers=accept)
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        blocks = [dict(line.split(": ", 1) for line in block.split("\n")) for block in response.text.split("\n\n")[:-1]]
        messages = [json.loads(block["data"]) for block in blocks]
        assert [message for message in messages if message["type"] == "event"] == [
            message for message in over_socket if message["type"] == "event"
        ]
        assert [message["type"] for message in messages[:2]] == ["connected", "state"]
        assert messages[-1]["data"]["status"] == "SUCCEEDED"
        assert [int(block["id"]) for block in blocks if "id" in block] == list(range(1, 9))
        resumed = client.http.get(path, headers={**accept, "Last-Event-ID": "7"})
        assert re.findall(r"^id: (\d+)$", resumed.text, re.MULTILINE) == ["8"]
        assert client.http.get(path, headers={**accept, "Last-Event-ID": "8"}).status_code == 204
        assert client.http.get("/api/tasks/nope/events", headers=accept).status_code == 404


def test_artifacts_stay_inside_the_workspace(tmp_path: Path) -> None:
    """Listing and reading see the task's own visible files, and nothing through .., links or absolute paths."""
    (tmp_path / "secret.txt").write_text("secret")

    def runner(run: Run) -> None:
        (run.workspace / "docs" / ".git").mkdir(parents=True)
        (run.workspace / "docs" / ".git" / "config").write_text("hidden")
        (run.workspace / "docs" / "page.html").write_text("<script>alert(1)</script>")
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
        changes = [(event["payload"]["change"], event["payload"]["path"]) for event in record.of("ARTIFACT")]
        assert changes[:2] == [("created", "docs/page.html"), ("created", "logo.bin")]
        assert changes[2:] == [("modified", "docs/page.html"), ("deleted", "logo.bin")]
        base = f"/api/tasks/{task_id}/artifacts"
        assert [file["path"] for file in client.get(base)] == ["docs/page.html"]
        page = client.http.get(f"{base}/docs/page.html")
        assert page.headers["content-type"] == "text/plain; charset=utf-8"
        assert page.headers["x-content-type-options"] == "nosniff"
        bad = ["../secret.txt", "%2e%2e/secret.txt", "..%2f..%2fsecret.txt", "/etc/hostname", "%2fetc%2fhostname"]
        bad += ["link.txt", "outside/secret.txt", "docs/.git/config", "docs", "", "%00", "x" * 5000, "no.txt"]
        for path in bad:
            response = client.http.get(f"{base}/{path}")
            assert response.status_code == 404, path
            assert "secret" not in response.text.replace(path, "").replace("secret.txt", "")


def test_health_and_metrics_count(tmp_path: Path) -> None:
    """healthz says mode and load, metrics is Prometheus text that adds up."""
    with live(burst(7), tmp_path) as client:
        client.watch(client.create())
        health = client.get("/healthz")
        assert (health["status"], health["mode"], health["engine"]) == ("ok", "test", "ready")
        assert health["tasks"] == {"SUCCEEDED": 1}
        text = client.http.get("/metrics").text
        values = dict(re.findall(r"^(\S+(?:\{.*?\})?) (\d+)$", text, re.MULTILINE))
        assert values['streamer_tasks{status="SUCCEEDED"}'] == "1"
        assert (values["streamer_events_total"], values["streamer_deliveries_total"]) == ("10", "10")
        assert all(line.startswith("# TYPE") or re.fullmatch(r"\S+ \d+", line) for line in text.splitlines())
        assert "wscat -c ws://" in client.http.get("/").text


# -----------------------------------------------------------------------------
# Application
# -----------------------------------------------------------------------------


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_signals_stop_the_run_tell_the_clients_and_exit(tmp_path: Path, how: signal.Signals) -> None:
    """Ten clients of a running task get what was emitted and TASK_CANCELLED, one of an idle task 1001."""
    with process(SERVER, "--test-mode", "--port", "0", cwd=tmp_path) as server:
        client = server.client
        task_id, idle_id = client.create(), client.create()
        with contextlib.ExitStack() as stack, client.socket(idle_id, "start=false") as idle:
            watchers = [stack.enter_context(client.socket(task_id)) for _ in range(10)]
            for websocket in watchers:
                receive_until(websocket, is_event("TOKEN"))
            receive_until(idle, lambda message: message["type"] == "state")
            server.popen.send_signal(how)
            records = [Record(websocket) for websocket in watchers]
            idle_record = Record(idle)
        code = server.wait()
    for record in records:
        assert record.events[-1]["event_type"] == "TASK_CANCELLED"
        assert record.ids == list(range(record.ids[0], record.ids[-1] + 1))
        assert (record.last_state["status"], record.close_code) == ("CANCELLED", 1000)
    assert idle_record.messages[-1]["data"]["code"] == "server_closing"
    assert idle_record.close_code == 1001
    assert code == (0 if how is signal.SIGINT else -signal.SIGTERM)
    assert "Traceback" not in "".join(server.errors)


def test_signal_ends_a_process_whose_thread_does_not_stop(tmp_path: Path) -> None:
    """A runner that ignores its cancel keeps the process no longer than `grace`."""
    code = """
import threading, streamer
settings = streamer.Settings(port=0, test_mode=True, grace=1.0)
streamer.logging.basicConfig(level="INFO")
streamer.serve(streamer.create_app(settings, runner=lambda run: (run.emit("LOG"), threading.Event().wait())), settings)
"""
    with process("-c", code, cwd=tmp_path) as server:
        with server.client.socket(server.client.create()) as websocket:
            receive_until(websocket, is_event("LOG"))
            server.popen.send_signal(signal.SIGTERM)
            record = Record(websocket)
        assert "was abandoned" in record.events[-1]["payload"]["message"]
        assert server.wait() == -signal.SIGTERM
        assert "Traceback" not in "".join(server.errors)


def test_run_shows_a_task_in_the_terminal(tmp_path: Path) -> None:
    """`streamer.py run` prints agents, tokens, progress and files, and exits 0."""
    with process(SERVER, "run", "Build a todo app", "--test-mode", cwd=tmp_path) as command:
        assert command.wait() == 0
        text = command.output.decode()
        for part in ("[ProductManager] AGENT_START", "# Requirements", "-- RUNNING 25%", "TASK_COMPLETE", "files: "):
            assert part in text
        assert command.errors == []


def test_run_that_is_interrupted_or_fails_says_so(tmp_path: Path) -> None:
    """Ctrl-C exits 130 without a traceback; a failed task exits 1 with its reason on the screen."""
    with process(SERVER, "run", "Build", "--test-mode", cwd=tmp_path) as command:
        (tmp_path / "workspace").mkdir(exist_ok=True)
        while not list((tmp_path / "workspace").glob("*/docs/prd.md")):
            os.sched_yield()
        assert command.stop(signal.SIGINT) == 130
        assert command.errors == []
    with process(SERVER, "run", "Build", "--test-mode", "--task-timeout", "0.2", cwd=tmp_path) as command:
        assert command.wait() == 1
        assert b"timed out after 0.2 s" in command.output


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "no model is configured. Set OPENAI_API_KEY"),
        (["--port", "http"], "--port must be a whole number, not 'http'"),
        (["--host", "0.0.0.0", "--test-mode"], "host must be a loopback address"),
        (["run", "--test-mode"], "run takes one prompt"),
        (["run", " ", "--test-mode"], "prompt must be 1 to 32000 characters"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_wrong_usage_exits_2_and_says_what_to_do(tmp_path: Path, arguments: list[str], complaint: str) -> None:
    """It never falls back to the scripted team by itself."""
    with process(SERVER, *arguments, cwd=tmp_path) as command:
        assert command.wait() == 2
        assert complaint in "".join(command.errors)
        assert "Traceback" not in "".join(command.errors)


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ("llm: [", "config2.yaml cannot be read"),
        ("llm: 7", "must hold a mapping"),
        ("llm:\n  api_key: YOUR_API_KEY", "no model is configured"),
        ("llm:\n  api_type: gemini\n  api_key: abc", "needs a package: pip install 'google-generativeai'"),
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
    """--help names every setting."""
    with process(SERVER, "--help", cwd=tmp_path) as command:
        assert command.wait() == 0
        text = command.output.decode()
    assert "examples:" in text
    assert set(re.findall(r"^  --([a-z-]+)", text, re.MULTILINE)) == {
        name.replace("_", "-") for name in Settings.__dataclass_fields__
    }


def test_watcher_exits_by_the_outcome(tmp_path: Path) -> None:
    """`python test_streamer.py <task_id>`: 0 for SUCCEEDED, 1 for another end, 2 for no such task or server."""
    watcher = str(HERE / "test_streamer.py")

    def runner(run: Run) -> None:
        run.emit("TOKEN", {"message": "hello", "call_id": "c"}, "Engineer")
        if "fail" in run.prompt:
            raise RuntimeError("as asked")

    with live(runner, tmp_path) as client:
        for prompt, code in (("succeed", 0), ("fail", 1)):
            with process(watcher, client.create(prompt), "--url", client.url, cwd=tmp_path) as command:
                assert command.wait() == code
                assert "hello" in command.output.decode()
        with process(watcher, "nope", "--url", client.url, cwd=tmp_path) as command:
            assert command.wait() == 2
            assert "not found" in command.output.decode()
    with process(watcher, "nope", "--url", client.url, cwd=tmp_path) as command:
        assert command.wait() == 2
        assert "cannot connect" in "".join(command.errors)


# -----------------------------------------------------------------------------
# The README
# -----------------------------------------------------------------------------


def readme_blocks(heading: str) -> list[str]:
    text = (HERE / "README.md").read_text()
    section = text.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    return re.findall(r"```bash\n(.*?)```", section, re.DOTALL)


def test_readme_lines_work_as_written(scripted: Client, tmp_path: Path) -> None:
    """The curl and wscat lines of "By hand", typed one after the other; only the port differs."""
    needs("curl")
    needs("wscat")
    lines = "".join(readme_blocks("By hand")).replace(":8000", f":{scripted.url.rsplit(':', 1)[1]}")
    readable, writable = os.pipe()  # a person's terminal: an input that stays open and says nothing
    try:
        done = subprocess.run(["bash", "-ec", lines], stdin=readable, capture_output=True, text=True, cwd=tmp_path)
    finally:
        os.close(readable)
        os.close(writable)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    for part in ('"type":"connected"', '"event_type":"TASK_COMPLETE"', '"status":"CANCELLED"', "id: 1\n"):
        assert part in done.stdout, part
    assert {each["status"] for each in scripted.get("/api/tasks")["items"]} == {"SUCCEEDED", "CANCELLED"}


def test_readme_names_every_setting_and_route() -> None:
    """The README's tables are complete."""
    text = (HERE / "README.md").read_text()
    missing = [name for name in Settings.__dataclass_fields__ if f"`{name}`" not in text]
    paths = {getattr(route, "path").replace("task_id", "id").replace(":path", "") for route in streamer.ROUTES}  # noqa: B009
    missing += sorted(path for path in paths if path not in text)
    missing += [kind for kind in EventType if f"`{kind}`" not in text]
    assert missing == []


def test_readme_embedding_example_runs(tmp_path: Path) -> None:
    """The runner of one's own, as the README shows it."""
    text = (HERE / "README.md").read_text()
    example = re.findall(r"```python\n(from streamer import.*?)```", text, re.DOTALL)[0]
    code = example.replace("Settings()", "Settings(port=0, test_mode=True)")
    code = "import logging\nlogging.basicConfig(level='INFO')\n" + code
    with process("-c", code, cwd=tmp_path) as server:
        record = server.client.watch(server.client.create())
        assert record.last_state["status"] == "SUCCEEDED"
        assert record.of("MESSAGE")


# -----------------------------------------------------------------------------
# Commands
# -----------------------------------------------------------------------------


def watch(task_id: str, url: str) -> int:
    """Shows a task as `wscat` would, but readable; resumes a connection that drops, while it gets further."""
    transcript, after, status, cursor = streamer.Transcript(), 0, "", -1
    while cursor < after or cursor == -1:
        cursor = max(after, 0)
        address = f"{url.rstrip('/').replace('http', 'ws', 1)}/ws/tasks/{task_id}?after={after}"
        try:
            with connect(address, max_size=None) as websocket:
                for text in websocket:
                    message = json.loads(text)
                    transcript.show(message)
                    after = message["data"].get("event_id", after)
                    status = message["data"].get("status", status)
                    if message["type"] == "error":
                        return 2
                return 0 if status == TaskStatus.SUCCEEDED else 1
        except ConnectionClosed as error:
            print(f"\nconnection lost ({error}); resuming after event {after}", file=sys.stderr)
        except OSError as error:
            print(f"cannot connect to {url}: {error}", file=sys.stderr)
            return 2
    return 2


def main() -> int:
    parser = argparse.ArgumentParser(description="Watch a task on a running streamer. Exits 0 if it SUCCEEDED.")
    parser.add_argument("task_id", help="the id that POST /api/tasks answered")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the server (http://127.0.0.1:8000)")
    arguments = parser.parse_args()
    return watch(arguments.task_id, arguments.url)


if __name__ == "__main__":
    sys.exit(main())
