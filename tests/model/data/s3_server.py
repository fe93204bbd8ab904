"""Run by test_storage.py: moto's S3 server behind faults that the test orders. It prints its port.

GET of ``/-/requests`` answers with the paths of all GETs so far. PUT of ``/-/faults`` takes the faults to come: a JSON object of
the last part of a key to a list, one fault for each GET. A number is a status to answer with, "zeros" contents of the right
length, "cut" a connection that ends in the middle.
"""

import json

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

REFUSED = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"


class Faults:
    """The order of faults, in front of the server."""

    def __init__(self, server) -> None:
        self.server = server
        self.requests: list[str] = []
        self.faults: dict[str, list] = {}

    def __call__(self, environ, start_response):
        path, method = environ["PATH_INFO"], environ["REQUEST_METHOD"]
        if path == "/-/requests":
            start_response("200 OK", [])
            return [json.dumps(self.requests).encode()]
        if path == "/-/faults":
            self.faults = json.loads(environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"])))
            self.requests.clear()
            start_response("200 OK", [])
            return []
        if method != "GET":
            return self.server(environ, start_response)
        self.requests.append(path)
        waiting = self.faults.get(path.rsplit("/", 1)[-1])
        fault = waiting.pop(0) if waiting else None
        if isinstance(fault, int):
            start_response(f"{fault} Fault", [("Content-Type", "application/xml")])
            return [REFUSED]
        body = self.server(environ, start_response)
        if fault is None:
            return body
        data = b"".join(body)
        return [bytes(len(data)) if fault == "zeros" else data[: len(data) // 2]]


class Quiet(WSGIRequestHandler):
    """No log."""

    def log(self, *_) -> None:
        pass


if __name__ == "__main__":
    application = Faults(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, application, threaded=True, request_handler=Quiet)
    print(server.server_port, flush=True)
    server.serve_forever()
