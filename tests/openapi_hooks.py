"""What schemathesis must know beyond the description: how to make images, and two rules that a schema cannot say."""
import base64
import struct
import zlib
from itertools import chain

import schemathesis
from hypothesis import strategies as st


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, pixel: bytes) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress((b"\0" + pixel * width) * height)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def bmp(width: int, height: int, pixel: bytes) -> bytes:
    rows = (pixel * width + bytes(-3 * width % 4)) * height
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, len(rows), 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54 + len(rows), 0, 0, 54) + head + rows


def npy(width: int, height: int, pixel: bytes) -> bytes:
    head = f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({height}, {width}, 3), }}\n".encode()
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(head)) + head + pixel * (width * height)


def made(*kinds) -> st.SearchStrategy[bytes]:
    "Some images of each kind, made beforehand: a list that is too long has hundreds of them."
    return st.sampled_from([kind(1 + k, 40 - k, bytes([k, 6 * k, 255])) for kind in kinds for k in range(40)])


IMAGES = made(png, bmp)
for kind in ("image/*", "application/octet-stream", "application/x-image"):
    schemathesis.openapi.media_type(kind, IMAGES)
schemathesis.openapi.media_type("application/x-npy", made(npy))
schemathesis.openapi.format("binary", IMAGES)
schemathesis.openapi.format("base64-image", IMAGES.map(lambda data: base64.b64encode(data).decode()))


@schemathesis.hook
def filter_case(context, case) -> bool:
    "Leave out well-formed pixels that must be refused: ragged rows, and numbers that are all within 0 and 1."
    body, meta = case.body, case.meta
    if not (isinstance(body, dict) and "inputs" in body and meta and meta.generation.mode.is_positive):
        return True
    values = list(chain.from_iterable(chain.from_iterable(body["inputs"])))
    return len({*map(len, body["inputs"])}) == 1 and (max(values) > 1 or all(v == int(v) for v in values))
