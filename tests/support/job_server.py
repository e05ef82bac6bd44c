"""A job server that speaks Ray's REST API, keeps jobs in memory and runs none of them."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from aiohttp import web


class JobServer:
    """What was asked of it; every job ends at once, with `exit_code`, having printed its command."""

    def __init__(self, token: str = "") -> None:
        self.address = ""
        self.exit_code = 0
        self.jobs: dict[str, dict[str, Any]] = {}
        self.packages: set[str] = set()
        self._token = token

    @web.middleware
    async def authenticate(self, request: web.Request, handler: Any) -> web.StreamResponse:
        if self._token and request.headers.get("Authorization") != f"Bearer {self._token}":
            return web.Response(status=401, text="Unauthorized: Missing authentication token")
        return await handler(request)

    async def version(self, request: web.Request) -> web.Response:
        return web.json_response({"version": "4", "ray_version": ray.__version__, "ray_commit": ""})

    async def find_package(self, request: web.Request) -> web.Response:
        return web.Response(status=200 if request.match_info["name"] in self.packages else 404)

    async def put_package(self, request: web.Request) -> web.Response:
        self.packages.add(request.match_info["name"])
        return web.Response()

    async def list(self, request: web.Request) -> web.Response:
        return web.json_response(list(self.jobs.values()))

    async def submit(self, request: web.Request) -> web.Response:
        job = await request.json()
        name = job["submission_id"]
        ended = {"status": "FAILED" if self.exit_code else "SUCCEEDED", "driver_exit_code": self.exit_code}
        self.jobs[name] = {"type": "SUBMISSION"} | job | ended
        return web.json_response({"job_id": name, "submission_id": name})

    async def show(self, request: web.Request) -> web.Response:
        return web.json_response(self.jobs[request.match_info["name"]])

    async def tail(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        await socket.send_str(self.jobs[request.match_info["name"]]["entrypoint"] + "\n")
        await socket.close()
        return socket

    async def serve(self, ready: threading.Event, stop: asyncio.Event) -> None:
        app = web.Application(middlewares=[self.authenticate])
        app.add_routes(
            [
                web.get("/api/version", self.version),
                web.get("/api/packages/gcs/{name}", self.find_package),
                web.put("/api/packages/gcs/{name}", self.put_package),
                web.get("/api/jobs/", self.list),
                web.post("/api/jobs/", self.submit),
                web.get("/api/jobs/{name}", self.show),
                web.get("/api/jobs/{name}/logs/tail", self.tail),
            ]
        )
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0]
        self.address = f"http://{host}:{port}"
        ready.set()
        await stop.wait()
        await runner.cleanup()


@contextmanager
def job_server(token: str = "") -> Iterator[JobServer]:
    """One that listens on a port of its own; with a `token`, only who sends it is heard."""
    server, ready, stop, loop = JobServer(token), threading.Event(), asyncio.Event(), asyncio.new_event_loop()
    thread = threading.Thread(target=lambda: loop.run_until_complete(server.serve(ready, stop)))
    thread.start()
    assert ready.wait(10)
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
        loop.close()
