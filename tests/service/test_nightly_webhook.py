"""The webhook against a real receiver on loopback: one message a night, signed, retried, and never in the way of the result."""

from __future__ import annotations

import hashlib
import hmac
import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.errors import UserError
from service.history.store import NightStore, Outcome
from service.nightly import webhook
from service.nightly.night import Done, On, tell
from service.nightly.webhook import MAX_TEXT, PAUSES_S, Receiver, deliver, message, receiver_from, signature
from tests.service.synthetic import home_in


class Inbox:
    """What a receiver was sent. `answers` are given in turn, then 200."""

    def __init__(self) -> None:
        self.answers: list[int] = []
        self.requests: list[tuple[dict[str, str], bytes]] = []
        self.taken: list[bytes] = []
        self.url = ""


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def inbox(monkeypatch: pytest.MonkeyPatch) -> Iterator[Inbox]:
    monkeypatch.setattr(webhook, "PAUSES_S", (0.0, 0.0))
    found = Inbox()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            found.requests.append(({k.lower(): v for k, v in self.headers.items()}, body))
            answer = found.answers.pop(0) if found.answers else 200
            if answer == 200:
                found.taken.append(body)
            self.send_response(answer)
            if answer == 302:
                self.send_header("Location", "/elsewhere")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.url = f"http://127.0.0.1:{server.server_port}/services/T0/B0/password"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield found
    server.shutdown()
    server.server_close()


def night(status: str = "REGRESSION", name: str = "2026-01-08") -> Done:
    title = f"CP Lab planted {name}: {status}: overlapped in a cell"
    return Done(Outcome("planted", name, "sweep", status, 1, {"title": title}), f"# {title}\n\n- the rest\n", True)


def test_a_message_is_slacks_and_carries_the_whole_summary(inbox: Inbox, tmp_path: Path) -> None:
    assert tell(home_in(tmp_path), night(), Receiver(inbox.url), On.REGRESSION) == "told http://127.0.0.1"
    (body,) = inbox.taken
    sent = json.loads(body)
    assert set(sent) == {"text", "blocks"}
    assert sent["text"].startswith("CP Lab planted 2026-01-08: REGRESSION")
    assert "the rest" in sent["blocks"][1]["text"]["text"]
    assert inbox.requests[0][0]["content-type"] == "application/json"


def test_exactly_one_message_a_night_also_after_a_retry(inbox: Inbox, tmp_path: Path) -> None:
    inbox.answers = [503, 429]
    home, receiver = home_in(tmp_path), Receiver(inbox.url)
    assert tell(home, night(), receiver, On.REGRESSION).startswith("told")
    assert "already" in tell(home, night(), receiver, On.REGRESSION)
    assert "already" in tell(home, night("FINE"), receiver, On.ALWAYS)
    assert (len(inbox.requests), len(inbox.taken)) == (3, 1)
    assert len({headers["idempotency-key"] for headers, _ in inbox.requests}) == 1
    tell(home, night(name="2026-01-09"), receiver, On.REGRESSION)
    assert len(inbox.taken) == 2


def test_a_message_that_was_not_taken_is_sent_by_the_next_start(inbox: Inbox, tmp_path: Path) -> None:
    inbox.answers = [500, 500, 500]
    home, receiver = home_in(tmp_path), Receiver(inbox.url)
    words = tell(home, night(), receiver, On.REGRESSION)
    assert "not told" in words and "3 attempts (HTTP 500)" in words
    assert not inbox.taken
    assert tell(home, night(), receiver, On.REGRESSION).startswith("told")
    assert len(inbox.taken) == 1


def test_when_people_are_told(inbox: Inbox, tmp_path: Path) -> None:
    home, receiver = home_in(tmp_path), Receiver(inbox.url)
    for i, (status, on, is_told) in enumerate(
        [
            ("FINE", On.REGRESSION, False),
            ("YOUNG", On.REGRESSION, False),
            ("FINE", On.ALWAYS, True),
            ("MOVED", On.REGRESSION, True),
            ("PARTIAL", On.REGRESSION, True),
            ("FAILED", On.REGRESSION, True),
        ]
    ):
        before = len(inbox.taken)
        tell(home, night(status, f"2026-02-{i + 1:02d}"), receiver, on)
        assert (len(inbox.taken) > before) is is_told, status
    assert tell(home, night(), None, On.ALWAYS) == ""


def test_a_refusal_for_good_is_not_repeated_and_a_redirect_is_not_followed(inbox: Inbox) -> None:
    for answer in (404, 302):
        inbox.answers, before = [answer], len(inbox.requests)
        done = deliver(Receiver(inbox.url), message("t", "b"), "key")
        assert (done.is_delivered, done.attempts, done.reason) == (False, 1, f"HTTP {answer}")
        assert len(inbox.requests) == before + 1


def test_a_signature_proves_who_sent_it(inbox: Inbox) -> None:
    deliver(Receiver(inbox.url, "a secret"), message("t", "b"), "key")
    ((headers, body),) = inbox.requests
    signed = headers["x-cplab-timestamp"].encode() + b"." + body
    assert headers["x-cplab-signature"] == "sha256=" + hmac.new(b"a secret", signed, hashlib.sha256).hexdigest()
    deliver(Receiver(inbox.url), message("t", "b"), "key")
    assert "x-cplab-signature" not in inbox.requests[1][0]


@given(st.text(min_size=1), st.integers(0, 2**40), st.binary(), st.binary())
def test_another_body_has_another_signature(secret: str, timestamp: int, body: bytes, other: bytes) -> None:
    secret = secret.encode("utf-8", "ignore").decode()
    same = signature(secret, str(timestamp), body) == signature(secret, str(timestamp), other)
    assert same is (body == other)


def test_a_receiver_that_is_not_there_costs_words_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/"
    pauses: list[float] = []
    done = deliver(Receiver(url), message("t", "b"), "key", pauses.append)
    assert (done.is_delivered, done.attempts, pauses) == (False, 3, list(PAUSES_S))
    monkeypatch.setattr(webhook, "PAUSES_S", (0.0, 0.0))
    assert "not told" in tell(home_in(tmp_path), night(), Receiver(url), On.REGRESSION)


def test_one_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhook, "TIMEOUT_S", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        done = deliver(Receiver(f"http://127.0.0.1:{silent.getsockname()[1]}/"), message("t", "b"), "key", lambda s: None)
    assert (done.is_delivered, done.attempts) == (False, 3)
    assert "timed out" in done.reason


def test_a_long_summary_is_cut_where_slack_would_refuse_it() -> None:
    block = json.loads(message("t", "x" * 10_000))["blocks"][1]
    assert len(block["text"]["text"]) <= MAX_TEXT + 4


def test_the_address_comes_by_the_environment_and_is_never_shown_whole() -> None:
    assert receiver_from({}) is None
    found = receiver_from({"CPLAB_WEBHOOK_URL": "https://hooks.example.com/services/password", "CPLAB_WEBHOOK_SECRET": "s"})
    assert found == Receiver("https://hooks.example.com/services/password", "s")
    assert found.shown == "https://hooks.example.com"
    for wrong in ("hooks.example.com", "file:///etc/passwd", "https://"):
        with pytest.raises(UserError, match="CPLAB_WEBHOOK_URL"):
            receiver_from({"CPLAB_WEBHOOK_URL": wrong})


def test_attempts_are_counted_and_a_delivery_is_kept(tmp_path: Path) -> None:
    store = NightStore(tmp_path)
    store.keep_message("planted", "2026-01-01", 3, False)
    assert not store.is_told("planted", "2026-01-01")
    store.keep_message("planted", "2026-01-01", 1, True)
    store.keep_message("planted", "2026-01-01", 1, False)
    assert store.is_told("planted", "2026-01-01")
    assert not store.is_told("other", "2026-01-01")
    store.close()
