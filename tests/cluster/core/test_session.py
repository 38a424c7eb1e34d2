"""Whom a job may join: no Ray on the network that takes code from anybody."""

from __future__ import annotations

import pytest

from cnnray.cluster.core.session import refuse_open_cluster
from cnnray.config import PackSettings, load_settings
from cnnray.errors import SettingsError

LOOPBACK = ("127.0.0.1:6379", "127.8.9.1:6379", "localhost:6379", "[::1]:6379", "ray://[::1]:10001")
NETWORK = (
    "10.0.0.5:6379",
    "0.0.0.0:6379",
    "192.0.2.2:6379",
    "[fd00::2]:6379",
    "ray://head:10001",
    "head.example:6379",
    "localhost.example:6379",
    "127.0.0.1.example:6379",
    "head",
)
"""The third is what a job in ``ray job submit`` finds in RAY_ADDRESS."""


@pytest.mark.parametrize("environment", [{}, {"RAY_AUTH_MODE": ""}, {"RAY_AUTH_MODE": "disabled"}])
@pytest.mark.parametrize("address", NETWORK)
def test_a_ray_on_the_network_without_a_token_is_refused_with_a_remedy(address, environment):
    with pytest.raises(SettingsError) as caught:
        refuse_open_cluster(address, environment, trusted_network=False)
    said, remedy = str(caught.value).splitlines()
    assert said.startswith(f"Ray at {address} asks for no token")
    assert "RAY_AUTH_MODE=token" in remedy
    assert "--cluster.trusted_network" in remedy
    assert caught.value.exit_code == 2


def test_a_token_in_a_file_counts_only_where_the_mode_says_so():
    # Ray itself looks for the file when it is given no address, and then sets the mode.
    with pytest.raises(SettingsError):
        refuse_open_cluster(NETWORK[0], {"RAY_AUTH_TOKEN": "a" * 64}, trusted_network=False)


@pytest.mark.parametrize("mode", ["token", "TOKEN"])
@pytest.mark.parametrize("address", NETWORK)
def test_a_ray_with_a_token_is_joined(address, mode):
    refuse_open_cluster(address, {"RAY_AUTH_MODE": mode}, trusted_network=False)


@pytest.mark.parametrize("address", LOOPBACK)
def test_a_ray_on_loopback_is_joined(address):
    refuse_open_cluster(address, {}, trusted_network=False)


def test_a_network_that_is_trusted_needs_no_token():
    flags = ["--input=i", "--output=o", "--cluster.trusted_network"]
    settings = load_settings(PackSettings, flags)
    for address in NETWORK:
        refuse_open_cluster(address, {}, trusted_network=settings.cluster.trusted_network)
    assert PackSettings(input="i", output="o").cluster.trusted_network is False
