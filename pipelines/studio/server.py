"""The studio's addresses: Gradio's page, and beside it clips and tables. Nothing is loaded from elsewhere."""

import logging
import os
import re
import threading
from pathlib import Path

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
os.environ["HF_HUB_OFFLINE"] = "1"

import gradio as gr
import uvicorn
from fastapi import FastAPI, HTTPException, Response
from fastapi.responses import FileResponse, PlainTextResponse
from starlette.datastructures import MutableHeaders
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from model.errors import UserError
from pipelines.studio import pages, render, study
from pipelines.studio.state import Studio, StudioConfig

# What browsers may load, whatever a page says. Gradio's own scripts are inline, and its templates are functions made of text.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' blob:; font-src 'self' data:; worker-src 'self' blob:; object-src 'none'; "
    "base-uri 'self'; frame-ancestors 'self'"
)
HEADERS = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
# The studio's own addresses, and of Gradio's what the page needs: no uploads, no files by path, no proxy, no editing of code.
OWN = r"clips/[^/]+|shown/[^/]+|shards/.+|votes\.csv"
PAGE = r"config|theme\.css|(assets|static|svelte)/.+|favicon\.ico|manifest\.json|robots\.txt"
CALLS = r"gradio_api/(info|queue/(join|data)|heartbeat/\w+|reset|cancel|call/.+|startup-events|app_id|token|theme\.css)"
KNOWN = re.compile(rf"/(({OWN}|{PAGE}|{CALLS})/?)?")
ELSEWHERE = re.compile(rb"<(link|meta)\b[^>]*https?://[^>]*>|<script\b[^>]*https?://[^>]*>\s*</script>")
END_SECONDS = 10  # that a job has to come to its next step; what it was making is lost either way
LOCAL = ("127.0.0.1", "localhost", "[::1]")


class Guard:
    """Keeps Gradio to what the page needs, and browsers to this server."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"]
        if not KNOWN.fullmatch(path):
            await PlainTextResponse("not part of the studio", 404, HEADERS)(scope, receive, send)
            return
        if path == "/":  # as it is, not compressed
            scope["headers"] = [(name, value) for name, value in scope["headers"] if name != b"accept-encoding"]
        start: Message = {}
        body = bytearray()

        async def pass_on(message: Message) -> None:
            nonlocal start
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(HEADERS)
                if path == "/" and headers.get("content-type", "").startswith("text/html"):
                    del headers["content-length"]
                    start = message
                    return
            elif start:  # Gradio's page, which is taken whole
                body.extend(message.get("body", b""))
                if message.get("more_body", False):
                    return
                await send(start)
                message = {"type": "http.response.body", "body": ELSEWHERE.sub(b"", bytes(body))}
            await send(message)

        await self.app(scope, receive, pass_on)


def build(studio: Studio) -> FastAPI:
    """The application, which owns nothing: whoever made the studio closes it."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    app.add_middleware(Guard)
    host = studio.config.host
    if host in LOCAL:  # a page from elsewhere whose name suddenly means this machine is turned away
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(LOCAL))

    @app.get("/clips/{name}")
    def clip(name: str) -> FileResponse:
        return _file(studio.history.path(name))

    @app.get("/shown/{name}")
    def shown(name: str) -> FileResponse:
        return _file(studio.scratch.path(name))

    @app.get("/shards/{shelf}/{stage}/{kind}/{index}.{suffix}")
    def sample(shelf: int, stage: str, kind: str, index: int, suffix: str) -> FileResponse:
        folders = list(studio.shelves)
        if not 0 <= shelf < len(folders):
            raise HTTPException(404)
        try:
            return _file(studio.sample_file(folders[shelf], f"{stage}/{kind}", index))
        except UserError as error:
            raise HTTPException(404, str(error)) from error

    @app.get("/votes.csv")
    def votes() -> Response:
        if studio.votes is None or "results" not in studio.config.tabs:
            raise HTTPException(404)
        return Response(study.to_csv(studio.votes.all()), media_type="text/csv")

    fonts = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]  # Gradio's default asks a server for its fonts
    gr.mount_gradio_app(
        app,
        pages.build(studio),
        path="/",
        theme=gr.themes.Default(font=fonts[0], font_mono=fonts[1]),
        css=render.CSS,
        footer_links=[],
        allowed_paths=[],
        max_file_size=0,
        ssr_mode=False,
        show_error=True,
    )
    return app


def _file(path: Path | None) -> FileResponse:
    if path is None:
        raise HTTPException(404)
    return FileResponse(path)


class Server(uvicorn.Server):
    """Says where it is once it can be reached, and ends without a stack trace for each page that is open."""

    async def startup(self, sockets: list[object] | None = None) -> None:  # type: ignore[override]
        await super().startup(sockets)  # type: ignore[arg-type]
        if self.started:
            port = self.servers[0].sockets[0].getsockname()[1]
            host = f"[{self.config.host}]" if ":" in self.config.host else self.config.host
            print(f"studio: http://{host}:{port}   (Ctrl-C ends it; clips are in the history)", flush=True)

    async def shutdown(self, sockets: list[object] | None = None) -> None:  # type: ignore[override]
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        await super().shutdown(sockets)  # type: ignore[arg-type]


def server(studio: Studio) -> Server:
    """A server that is ready to be run. Pages that are open keep a connection; at the end they are cut off after a second."""
    c = studio.config
    return Server(uvicorn.Config(build(studio), c.host, c.port, log_level="warning", timeout_graceful_shutdown=1))


def serve(c: StudioConfig) -> None:
    """Run the studio until it is interrupted.

    Raises:
        UserError: no models, shards or study where the config says, or an address that cannot be had.
    """
    studio = Studio(c)
    try:
        app = server(studio)
        try:
            app.run()
        except SystemExit as error:  # uvicorn has logged why
            if app.started:  # and is being ended
                raise KeyboardInterrupt from error
            raise UserError(f"no server at {c.host}:{c.port}: see above; another port is port=0, any free one") from error
    finally:
        closing = threading.Thread(target=studio.close, daemon=True)
        closing.start()
        closing.join(END_SECONDS)
