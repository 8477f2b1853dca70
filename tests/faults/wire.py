"""Hostile requests, drawn by a seed: framings that can be read in two ways, in pieces, one behind the other."""

import random
import re
import socket
import time
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np

from intel_nb.images import encode_jpeg
from intel_nb.scenes import sample_scene

PHOTO = encode_jpeg(sample_scene(2, np.random.default_rng(0)))
NO_LENGTHS = ["", "-5", "+5", "0x5", "5 5", "5,5", "5, 6", "5_0", "5.0", "1e3", "٥", "9" * 100,
              "9" * 5000, "\v5", "five"]
NO_CODINGS = ["gzip", "identity", "chunked, chunked", "gzip, chunked", "chunked;q=1", "\vchunked", "x", "chunked\0", ""]
NO_HOSTS = ["", "a b", "user@localhost", "localhost/", "evil.example", "localhost:80:80", "[::1", "a\tb", "locälhost"]
NO_CHUNKS = [b"zz\r\n", b"-1\r\n", b"f" * 40 + b"\r\n", b"5;x\r\nabc", b"5\r\nabcdeXX0\r\n\r\n", b"0x5\r\nabcde\r\n",
             b" 5\r\n", b"5\nabcde\n0\n\n", b"\r\n", b"5 \r\nabcde\r\n0\r\nHost: x\r\nbad trailer\r\n\r\n"]


@dataclass
class Sent:
    "The bytes of one connection, the names of its requests, and the names of requests that are hidden in bodies."
    data: bytes = b""
    names: list[str] = field(default_factory=list)
    hidden: list[str] = field(default_factory=list)
    ends: bool = True  # the last one can be reached, and closes the connection


def hide(name: str) -> bytes:
    "Return a request that stands in another one's body, where nobody may see it."
    return f"GET /drift HTTP/1.1\r\nHost: localhost\r\nX-Request-Id: {name}\r\n\r\n".encode()


def in_chunks(rng: random.Random, body: bytes) -> bytes:
    "Return `body` in chunks of random sizes, some with extensions and trailers."
    parts, at = [], 0
    while at < len(body):
        size = rng.randint(1, 3000)
        part = body[at:at + size]
        parts.append(b"%x%s\r\n%s\r\n" % (len(part), rng.choice([b"", b"", b";a=b"]), part))
        at += size
    return b"".join(parts) + b"0\r\n" + rng.choice([b"", b"", b"X-Late: 1\r\n"]) + b"\r\n"


def draw_framing(rng: random.Random, body: bytes) -> tuple[list[str], bytes]:
    "Return headers that say where `body` ends, or contradict each other, and the body."
    length = f"Content-Length: {len(body)}"
    coding = rng.choice(["Transfer-Encoding: chunked", "transfer-encoding: CHUNKED", "Transfer-Encoding:\tchunked "])
    spaced = coding.replace(":", " :", 1)
    no_length, no_coding = f"Content-Length: {rng.choice(NO_LENGTHS)}", f"Transfer-Encoding: {rng.choice(NO_CODINGS)}"
    chunks = in_chunks(rng, body)
    if rng.random() < .6:
        return rng.choice([([length], body), ([coding], chunks)])
    return rng.choice([
        ([length, coding], rng.choice([body, chunks])),
        ([coding, length], rng.choice([body, chunks])), ([length, length], body),
        ([length, f"Content-Length: {rng.randint(0, 99)}"], body), ([no_length], body),
        ([length, no_coding], body), ([no_coding], chunks), ([coding, coding], chunks),
        ([spaced], chunks), ([length, spaced], chunks), ([coding], rng.choice(NO_CHUNKS)),
        (["X: a", f" {coding}", length], body), ([f"X: a\r\n\t{length}", coding], chunks)])


def draw_head(rng: random.Random) -> tuple[str, list[str]]:
    "Return the first line of a request, and headers that have nothing to do with its body."
    if rng.random() < .6:
        return "POST /invocations HTTP/1.1", ["Host: localhost"]
    target = rng.choice(["/invocations"] * 6 + ["http://localhost/invocations", "http://evil.example/invocations", "*",
                                                "/", "//x/..", "/%00%ff", "invocations", "/drift", "http://", "/a b"])
    version = rng.choice(["HTTP/1.1"] * 12 + ["HTTP/1.0", "HTTP/2.0", "HTTP/1.2", "HTTP/9.9", "http/1.1", "HTTP/1",
                                               "H"])
    method = rng.choice(["POST"] * 8 + ["GET", "HEAD", "PUT", "BREW", "OPTIONS", "CONNECT", "TRACE", "P\0ST", "post"])
    own = "Host: localhost"
    host = rng.choice([[own]] * 9 + [[], [own, own], [own, "Host: evil.example"], [f"Host: {rng.choice(NO_HOSTS)}"]])
    more = rng.choice([[]] * 6 + [["Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABk"],
                                  ["Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Key: eA==",
                                   "Sec-WebSocket-Version: 13"], ["Upgrade: TLS/1.0"], ["Expect: 100-continue"],
                                  ["Expect: nothing"], ["Connection: Content-Length"], ["X" * 300 + ": y"],
                                  [f"A{i}: b" for i in range(150)], ["no colon"], [": no name"], ["X: \0"],
                                  ["Origin: http://evil.example"], 2 * ["Authorization: Bearer x"]])
    return f"{method} {target} {version}", [*host, *more]


def draw_connection(seed: int) -> Sent:
    "Return what one connection sends: one to three requests, hostile ones mostly, and a good last one."
    rng, sent = random.Random(seed), Sent()
    for number in range(rng.randint(1, 3)):
        name, hidden = f"r{seed}.{number}", f"hidden{seed}.{number}"
        body = rng.choice([PHOTO, b"", b"no image", hide(hidden), hide(hidden), PHOTO + hide(hidden)])
        framing, content = draw_framing(rng, body)
        line, more = draw_head(rng)
        headers = [*more, *framing, f"X-Request-Id: {name}", rng.choice(["Content-Type: image/jpeg", "Accept: */*"])]
        rng.shuffle(headers)
        sent.data += "\r\n".join([line, *headers, "", ""]).encode("utf-8", "surrogateescape") + content
        sent.names.append(name)
        sent.hidden.append(hidden)
    last = f"last{seed}"
    sent.data += f"GET /ping HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Request-Id: {last}\r\nConnection: close\r\n\r\n".encode()
    sent.names.append(last)
    return sent


def exchange(address: tuple[str, int], sent: Sent, rng: random.Random, patience: float = 0.5) -> bytes:
    "Send the bytes in up to six pieces, and return all that comes back until the connection closes or is silent."
    cuts = sorted(rng.randrange(len(sent.data) + 1) for _ in range(rng.choice([0, 0, 1, 2, 5])))
    pieces = [sent.data[a:b] for a, b in zip([0, *cuts], [*cuts, len(sent.data)])]
    received = b""
    with socket.create_connection(address, timeout=10) as raw, suppress(ConnectionError, TimeoutError):
        for piece in pieces:
            raw.sendall(piece)
            time.sleep(rng.choice([0, 0, 0.001]) if len(pieces) > 1 else 0)
        raw.settimeout(patience)
        while part := raw.recv(65536):
            received += part
    return received


STATUS_LINE = re.compile(rb"HTTP/1\.1 (\d\d\d) [ -~]*\r\n((?:[!-9;-~]+: ?[ -~]*\r\n)*)\r\n")


def answers_in(received: bytes) -> list[tuple[int, str]]:
    "Return status and request id of each answer; raise `AssertionError` for bytes that belong to none."
    found, at = [], 0
    while at < len(received):
        head = STATUS_LINE.match(received, at)
        assert head, f"no answer begins here: {received[at:at + 200]!r}"
        headers = dict(line.lower().split(b": ", 1) for line in head[2].split(b"\r\n") if line)
        at = head.end()
        if head[1] == b"100":
            continue
        size = int(headers[b"content-length"])
        is_head = received[at:at + 5] in (b"", b"HTTP/") and size  # the answer to HEAD has no body
        at += 0 if is_head else size
        assert at <= len(received), "an answer is cut off"
        found.append((int(head[1]), headers.get(b"x-request-id", b"").decode()))
    return found
