"""Servers of S3 and Google Cloud Storage on loopback (extras `cloud` and `emulators`)."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@pytest.fixture(params=["gs", "s3"])
def bucket(request) -> Iterator[str]:
    """Address of an empty bucket, which is served to this process and its children."""
    with pytest.MonkeyPatch.context() as patch, _server(request.param, patch):
        import fsspec

        fsspec.filesystem(request.param, skip_instance_cache=True).mkdir("bucket")
        yield f"{request.param}://bucket"


@contextmanager
def _server(scheme: str, patch: pytest.MonkeyPatch) -> Iterator[None]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    if scheme == "s3":
        pytest.importorskip("s3fs")
        server = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", port=0)
        server.start()
        host, port = server.get_host_and_port()
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for name, value in (("ACCESS_KEY_ID", "x"), ("SECRET_ACCESS_KEY", "y"), ("DEFAULT_REGION", "us-east-1")):
            patch.setenv(f"AWS_{name}", value)
    else:
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # or it asks Google what kind of bucket it is
        pytest.importorskip("gcsfs")
        server = pytest.importorskip("gcp_storage_emulator.server").create_server("127.0.0.1", 0, in_memory=True)
        server.start()
        patch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{server._api._httpd.server_address[1]}")
    try:
        yield
    finally:
        if scheme == "s3":
            import requests

            requests.post(f"{os.environ['AWS_ENDPOINT_URL']}/moto-api/reset")  # its state belongs to the process
        server.stop()
