"""A local S3 server that can be cut off: moto's, behind a proxy that refuses connections while it is down."""

import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any


class CutOff:
    """A TCP proxy on a port that stays its own. While it is down, connections are refused and open ones are reset."""

    def __init__(self, target: tuple[str, int]):
        self.target = target
        self._lock = threading.Lock()
        self._listener: socket.socket | None = None
        self._open: set[socket.socket] = set()
        self.port = 0
        self.cut_after: int | None = None
        """Go down once so many more bytes went to the server."""
        self.up()

    def up(self) -> None:
        """Take connections."""
        listener = socket.create_server(("127.0.0.1", self.port), backlog=64, reuse_port=False)
        self.port = listener.getsockname()[1]
        self._listener = listener
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def down(self) -> None:
        """Refuse connections, and break those that are open."""
        assert self._listener is not None
        listener, self._listener = self._listener, None
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        with self._lock:
            for connection in self._open:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def _is_enough(self, num_bytes: int) -> bool:
        with self._lock:
            if self.cut_after is None:
                return False
            self.cut_after -= num_bytes
            if self.cut_after > 0:
                return False
            self.cut_after = None
            return True

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            server = socket.create_connection(self.target)
            with self._lock:
                self._open |= {client, server}
            for source, sink in ((client, server), (server, client)):
                is_request = source is client
                threading.Thread(target=self._pump, args=(source, sink, is_request), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, is_request: bool) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(data)
                if is_request and self._is_enough(len(data)):
                    self.down()
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        with self._lock:
            self._open.discard(source)
        source.close()


class ObjectStore:
    """A bucket of its own on the server."""

    def __init__(self, link: CutOff):
        import boto3

        self.link = link
        self.bucket = f"bucket-{uuid.uuid4().hex[:12]}"
        self.url = f"s3://{self.bucket}"
        # Past the link: what the server holds can be asked while it is down.
        self.client: Any = boto3.client("s3", endpoint_url="http://{}:{}".format(*link.target))
        self.client.create_bucket(Bucket=self.bucket)

    def put(self, key: str, content: bytes) -> str:
        """Write an object; returns its URL."""
        self.client.put_object(Bucket=self.bucket, Key=key, Body=content)
        return f"{self.url}/{key}"

    def get(self, key: str) -> bytes:
        """The content of an object."""
        return self.client.get_object(Bucket=self.bucket, Key=key)["Body"].read()

    def listed(self, prefix: str = "") -> list[str]:
        """All keys."""
        listed = self.client.list_objects_v2(Bucket=self.bucket, Prefix=prefix)
        return [entry["Key"] for entry in listed.get("Contents", [])]

    def copy_in(self, folder: Any, prefix: str) -> str:
        """Copy the files of a folder; returns the URL of the prefix."""
        for file in sorted(folder.iterdir()):
            self.put(f"{prefix}/{file.name}", file.read_bytes())
        return f"{self.url}/{prefix}"

    def outage_after(self, num_bytes: int, seconds: float) -> None:
        """The server is away for so many seconds once so many bytes of requests came."""
        self.link.cut_after = num_bytes

        def wait() -> None:
            while self.link.cut_after is not None:
                time.sleep(0.05)
            time.sleep(seconds)
            self.link.up()

        threading.Thread(target=wait, daemon=True).start()

    @contextmanager
    def outage(self, seconds: float) -> Iterator[None]:
        """The server is away from now on, and back after so many seconds, whatever the block does."""
        self.link.down()
        back = threading.Timer(seconds, self.link.up)
        back.start()
        try:
            yield
        finally:
            back.join()


@contextmanager
def served() -> Iterator[CutOff]:
    """Run the server; clients of this process and its children find it by the environment."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # else a line for each request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    link = CutOff(("127.0.0.1", port))
    names = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{link.port}", "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing-secret", "AWS_DEFAULT_REGION": "us-east-1", "NO_PROXY": "127.0.0.1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }  # fmt: skip
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    try:
        yield link
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        link.down()
        server.stop()
