"""The webhook: one message a night to any URL, in the JSON that Slack takes. It may fail; the night's result does not wait for it.

With a secret, `X-CPLab-Signature` is `sha256=` and the hex HMAC-SHA256 of the timestamp header, a dot and the body. A repeat of a message has
the same `Idempotency-Key`, so that a receiver that took it and could not say so can drop the second.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from experiments.errors import UserError

URL_ENV_VAR = "CPLAB_WEBHOOK_URL"
SECRET_ENV_VAR = "CPLAB_WEBHOOK_SECRET"
"""Both come by the environment: they are passwords, and command lines are seen by everybody on a machine."""

TIMEOUT_S = 5.0
PAUSES_S = (1.0, 3.0)
"""Between attempts. With the timeouts, a receiver that never answers costs 19 s at most."""

MAX_TEXT = 2900
"""Characters of a block's text that Slack takes, with room for a mark of the cut."""

RETRIED = (408, 425, 429)
"""Refusals that may end by themselves; others of 4xx do not."""


@dataclass(frozen=True)
class Receiver:
    """Where messages go."""

    url: str
    secret: str = ""

    @property
    def shown(self) -> str:
        """Without the path, which is often a password."""
        parts = urllib.parse.urlsplit(self.url)
        return f"{parts.scheme}://{parts.hostname}"


@dataclass(frozen=True)
class Delivery:
    """How it went. `reason` says why not."""

    is_delivered: bool
    attempts: int
    reason: str = ""


def receiver_from(environment: Mapping[str, str] = os.environ) -> Receiver | None:
    """The receiver that the environment names, if it names one.

    Raises:
        UserError: It is no address.
    """
    url = environment.get(URL_ENV_VAR, "").strip()
    if not url:
        return None
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"{URL_ENV_VAR}: takes an http or https address")
    return Receiver(url, environment.get(SECRET_ENV_VAR, ""))


def message(title: str, body: str) -> bytes:
    """JSON that Slack takes, and others can read: `text` and one section."""
    body = body if len(body) <= MAX_TEXT else f"{body[:MAX_TEXT]} ..."
    blocks = [{"type": "section", "text": {"type": "mrkdwn", "text": text}} for text in (f"*{title}*", body) if text]
    return json.dumps({"text": title, "blocks": blocks}).encode()


def signature(secret: str, timestamp: str, body: bytes) -> str:
    return "sha256=" + hmac.new(secret.encode(), timestamp.encode() + b"." + body, hashlib.sha256).hexdigest()


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A message with a signature goes where it was addressed, or nowhere."""

    def redirect_request(self, *_: Any) -> None:
        return None


def deliver(receiver: Receiver, body: bytes, key: str, pause: Callable[[float], None] = time.sleep) -> Delivery:
    """Sends a message until it is taken, refused for good, or given up. Raises nothing."""
    opener = urllib.request.build_opener(_NoRedirects)
    reason, attempts = "", 0
    for pause_s in (*PAUSES_S, None):
        attempts += 1
        try:
            with opener.open(_request(receiver, body, key), timeout=TIMEOUT_S) as answer:
                answer.read(64)
            return Delivery(True, attempts)
        except urllib.error.HTTPError as error:
            reason = f"HTTP {error.code}"
            error.close()
            if error.code < 500 and error.code not in RETRIED:
                break
        except Exception as error:  # a proxy, a certificate, a header that is none: whatever ails it, the night stands
            reason = str(getattr(error, "reason", "") or error) or type(error).__name__
        if pause_s is not None:
            pause(pause_s)
    return Delivery(False, attempts, reason)


def _request(receiver: Receiver, body: bytes, key: str) -> urllib.request.Request:
    headers = {"Content-Type": "application/json", "User-Agent": "cplab", "Idempotency-Key": key}
    if receiver.secret:
        timestamp = str(int(time.time()))
        headers |= {"X-CPLab-Timestamp": timestamp, "X-CPLab-Signature": signature(receiver.secret, timestamp, body)}
    return urllib.request.Request(receiver.url, data=body, headers=headers, method="POST")
