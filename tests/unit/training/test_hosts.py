"""The interface that gloo is told to use on runs of several hosts."""

import pytest

from lorafusion_megatron.errors import UserError
from lorafusion_megatron.training import hosts
from lorafusion_megatron.training.hosts import address_towards, choose_interface, interface_of, interfaces

KNOWN = {
    "lo": ("127.0.0.1", "::1"),
    "eth0": ("10.0.0.5",),
    "ib0": ("192.168.7.5", "fd00::5"),
}


@pytest.fixture
def two_hosts(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The environment of a rank of two hosts with two ranks each."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")  # remembered, so that what a test sets is undone
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    for name, value in {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "head"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(hosts, "interfaces", lambda: KNOWN)
    monkeypatch.setattr(hosts, "address_towards", lambda host, port: "192.168.7.5")
    return monkeypatch


@pytest.mark.parametrize(("address", "name"), [("10.0.0.5", "eth0"), ("192.168.7.5", "ib0"), ("fd00::5", "ib0")])
def test_the_interface_that_has_the_address(address: str, name: str) -> None:
    assert interface_of(address, KNOWN) == name


@pytest.mark.parametrize("address", ["127.0.1.1", "::1"])
def test_a_loopback_address_means_the_only_other_interface(address: str) -> None:
    assert interface_of(address, {"lo": KNOWN["lo"], "eth0": KNOWN["eth0"]}) == "eth0"


def test_without_any_network_the_loopback_is_the_only_way() -> None:
    assert interface_of("127.0.0.1", {"lo": KNOWN["lo"]}) == "lo"


@pytest.mark.parametrize(("address", "known"), [("127.0.1.1", KNOWN), ("10.9.9.9", KNOWN), ("127.0.0.1", {})])
def test_where_it_is_not_clear_the_choices_are_named(address: str, known: dict[str, tuple[str, ...]]) -> None:
    choices = "eth0, ib0" if known else "none is up"
    with pytest.raises(
        UserError, match=f"GLOO_SOCKET_IFNAME: .*{address}.*set GLOO_SOCKET_IFNAME to one of: {choices}"
    ):
        interface_of(address, known)


def test_ranks_of_several_hosts_get_one(two_hosts: pytest.MonkeyPatch) -> None:
    note = choose_interface()
    assert note is not None
    assert note.startswith("gloo uses the interface ib0 (192.168.7.5), which leads to head")
    assert hosts.os.environ["GLOO_SOCKET_IFNAME"] == "ib0"
    assert choose_interface() is None


@pytest.mark.parametrize(
    ("name", "value"), [("GLOO_SOCKET_IFNAME", "eth9"), ("LOCAL_WORLD_SIZE", "4"), ("MASTER_ADDR", "")]
)
def test_what_is_set_and_what_is_one_host_stays(name: str, value: str, two_hosts: pytest.MonkeyPatch) -> None:
    two_hosts.setenv(name, value)
    before = hosts.os.environ.get("GLOO_SOCKET_IFNAME")
    assert choose_interface() is None
    assert hosts.os.environ.get("GLOO_SOCKET_IFNAME") == before


def test_a_first_host_that_is_not_known_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise hosts.socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(hosts.socket, "getaddrinfo", unknown)
    with pytest.raises(UserError, match=r"MASTER_ADDR: MASTER_ADDR is head\.x, .*Name or service not known"):
        address_towards("head.x", 1)


def test_this_machine_knows_its_loopback() -> None:
    assert "127.0.0.1" in interfaces()["lo"]
    assert address_towards("127.0.0.1", 29500) == "127.0.0.1"


@pytest.mark.parametrize(("given", "ranks"), [(None, 1), ("", 1), ("8", 8)])
def test_ranks_that_the_launcher_started(given: str | None, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if given is None:
        monkeypatch.delenv("WORLD_SIZE", raising=False)
    else:
        monkeypatch.setenv("WORLD_SIZE", given)
    assert hosts.world_size() == ranks


@pytest.mark.parametrize("given", ["abc", "0", "-1", "2.0"])
def test_a_world_size_that_is_no_number_is_told(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", given)
    with pytest.raises(UserError, match="it is the number of ranks"):
        hosts.world_size()


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"])
def test_what_a_launcher_sets_must_be_numbers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "1")
    hosts.check_launcher()
    monkeypatch.setenv(name, "x")
    with pytest.raises(UserError, match=rf"{name}: {name}=x; it is a number"):
        hosts.check_launcher()
