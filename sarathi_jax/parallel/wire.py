"""What goes over the connections between the processes of a replica.

A frame: kind, size, body. The body of a message: size of the header, header (JSON: name, dtype and shape of each
array), the arrays' bytes. Nothing is unpickled.
"""

import json
import socket
import struct

import numpy as np

type Message = dict[str, np.ndarray]

_FRAME = struct.Struct("<cI")  # kind, size of the body
_HEADER = struct.Struct("<I")


def read_frame(link: socket.socket) -> tuple[bytes, bytearray]:
    """Waits for a frame: its kind and its body.

    Raises:
      OSError: the connection broke, or was silent for longer than its timeout.
    """
    kind, size = _FRAME.unpack(read_exactly(link, _FRAME.size))
    return kind, read_exactly(link, size)


def read_exactly(link: socket.socket, num_bytes: int) -> bytearray:
    """Waits for so many bytes; errors as of `read_frame`."""
    body = bytearray(num_bytes)
    rest = memoryview(body)
    while rest:
        num_read = link.recv_into(rest)
        if not num_read:
            raise ConnectionError("the connection was closed")
        rest = rest[num_read:]
    return body


def frame(kind: bytes, body: bytes = b"") -> bytes:
    """A body with its kind, one byte, as it goes over the wire."""
    return _FRAME.pack(kind, len(body)) + body


def encode(message: Message) -> bytes:
    """The body of a message."""
    header = json.dumps([(name, array.dtype.name, array.shape) for name, array in message.items()]).encode()
    return b"".join([_HEADER.pack(len(header)), header, *(array.tobytes() for array in message.values())])


def decode(body: bytearray) -> Message:
    """What `encode` was given, as views of the body."""
    offset = _HEADER.size + _HEADER.unpack_from(body)[0]
    message: Message = {}
    for name, dtype, shape in json.loads(body[_HEADER.size : offset]):
        message[name] = np.ndarray(shape, dtype, body, offset)
        offset += message[name].nbytes
    return message


def from_text(text: str) -> np.ndarray:
    """A text as an array of a message."""
    return np.frombuffer(text.encode(), np.uint8)


def to_text(array: np.ndarray) -> str:
    """What `from_text` was given."""
    return array.tobytes().decode()
