"""S3 and Google Cloud Storage on this machine; tests skip without the packages that serve and that read them."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

import fsspec
import pytest

SECRET = "wJalrXUtnFEMI-not-a-real-key"


@contextmanager
def s3_server() -> Iterator[str]:
    """Run a moto server; yield its address."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@contextmanager
def gcs_server() -> Iterator[str]:
    """Run an emulator; yield its address."""
    emulator = pytest.importorskip("gcp_storage_emulator.server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = emulator.create_server("127.0.0.1", port, in_memory=True)
    server.start()
    yield f"http://127.0.0.1:{port}"
    server.stop()


def use_s3(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    """Send what goes to s3:// to this address."""
    for name, value in {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)


def make_bucket(name: str) -> None:
    """Make a bucket in the S3 that is in use."""
    import boto3

    boto3.client("s3").create_bucket(Bucket=name)


def use_gcs(monkeypatch: pytest.MonkeyPatch, endpoint: str, bucket: str) -> None:
    """Send what goes to gs:// to this address, and make a bucket there."""
    # Read when the package is imported: its other file system speaks gRPC, which the emulator does not.
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    pytest.importorskip("gcsfs")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", endpoint)
    monkeypatch.setitem(fsspec.config.conf, "gs", {"token": "anon", "project": "test"})
    fsspec.filesystem("gs", skip_instance_cache=True).mkdir(bucket)
