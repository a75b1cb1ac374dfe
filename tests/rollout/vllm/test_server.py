"""Tests the start of a server whose port another program has taken. Working servers are in
tests/rollout/test_generate.py."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from rollout.vllm.server import Server


class Impostor(BaseHTTPRequestHandler):
    """Answers every request, as if it were a healthy server of vLLM."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_another_program_on_the_port_is_not_taken_for_the_server(tmp_path: Path) -> None:
    server = Server(str(tmp_path / "absent"), host="127.0.0.1", options={"max-model-len": 64})
    with ThreadingHTTPServer(("127.0.0.1", server.port), Impostor) as impostor:
        threading.Thread(target=impostor.serve_forever, daemon=True).start()
        try:
            assert server._is_ready()  # the impostor answers
            with pytest.raises(RuntimeError, match="absent was not served"):
                server.url()
        finally:
            impostor.shutdown()
            server.close()
