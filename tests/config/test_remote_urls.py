"""The address that a run is copied to: what may be written, and what is refused without showing a secret."""

from __future__ import annotations

import pytest

from macdrop.errors import ConfigError
from tune.cli.verbs.train import train
from tune.config.messages import build
from tune.config.run_spec import RunSpec

SECRET = "wJalrXUtnFEMI-not-a-real-key"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("s3a://bucket/x", "Write s3://."),
        ("gcs://bucket/x", "Write gs://."),
        ("runs/copy", "must begin with s3://, gs:// or file://"),
        ("https://bucket.s3.amazonaws.com/x", "must begin with s3://"),
        ("s3://", "must name a bucket"),
        ("s3://Bucket/x", "must name a bucket of 3 to 63 lower-case letters"),
        ("s3://bucket/a/../b", "has an empty part, . or .."),
        ("file://folder/x", "must name a folder by its absolute path"),
        ("file:///", "must name a folder"),
        (f"s3://key:{SECRET}@bucket/x", "an address may hold no user, password"),
        (f"s3://bucket/x?secret={SECRET}", "an address may hold no user, password"),
        (1, "sync_to must be a text"),
    ],
)
def test_other_addresses_are_refused_without_showing_a_secret(given, message):
    with pytest.raises(ConfigError) as raised:
        build(RunSpec, {"model_name_or_path": "m", "sync_to": given})
    assert message in str(raised.value) and SECRET not in str(raised.value)


@pytest.mark.parametrize("given", ["s3://my-bucket", "s3://b.c-d/runs/x", "gs://bucket/a b", "file:///data/copy", None])
def test_addresses_of_stores_and_folders_are_accepted(given):
    assert RunSpec(model_name_or_path="m", sync_to=given).sync_to == given


def test_train_refuses_what_it_would_ignore():
    with pytest.raises(ConfigError, match="sync_to copies the run folder of a sweep"):
        train(["model_name_or_path=zoo:planted-llama", "sync_to=file:///nowhere"])
