"""Which headers cross the router, in both directions."""

from __future__ import annotations

import ipaddress

import pytest

from build_service.headers import Rules, to_caller

PEER = "192.0.2.7"


def sent(
    *headers: tuple[str, str], rules: Rules | None = None, peer: str | None = PEER, checks: bool = False
) -> list[tuple[str, str]]:
    given = [(name.encode(), value.encode()) for name, value in headers]
    made = (rules or Rules()).to_model(given, peer=peer, request_id="r", has_length=True, upstream_checks=checks)
    return [(name.lower(), value) for name, value in made]


OWN = [("x-request-id", "r"), ("x-forwarded-for", PEER)]


@pytest.mark.parametrize(
    "name", ["Authorization", "Cookie", "Proxy-Authorization", "authorization", "Proxy_Authorization"]
)
def test_credentials_end_at_the_router(name: str) -> None:
    assert sent((name, "secret")) == OWN


def test_a_token_goes_on_to_a_wrapper_that_checks_it_and_cookies_do_not() -> None:
    assert sent(("authorization", "secret"), ("cookie", "a=b"), checks=True) == [("authorization", "secret"), *OWN]


def test_chosen_credentials_go_on() -> None:
    rules = Rules(passed=frozenset((b"cookie",)))
    assert sent(("authorization", "secret"), ("cookie", "a=b"), rules=rules) == [("cookie", "a=b"), *OWN]


CLAIMS = [
    ("x-forwarded-for", "203.0.113.1"), ("x-forwarded-proto", "https"), ("x-forwarded-host", "h"),
    ("x-forwarded-access-token", "t"), ("forwarded", "for=203.0.113.1"), ("x-real-ip", "203.0.113.1"),
    ("x-client-ip", "203.0.113.1"), ("true-client-ip", "203.0.113.1"), ("x-original-url", "/admin"),
    ("x_forwarded_for", "203.0.113.1"),
]  # fmt: skip


@pytest.mark.parametrize("peer", [PEER, None, "no address"])
def test_what_a_stranger_says_of_callers_is_not_passed_on(peer: str | None) -> None:
    rules = Rules(proxies=(ipaddress.ip_network("198.51.100.0/24"),))
    names = [name for name, _ in sent(*CLAIMS, rules=rules, peer=peer)]
    assert names == (["x-request-id", "x-forwarded-for"] if peer else ["x-request-id"])


def test_what_a_known_proxy_says_is_passed_on_with_its_own_address() -> None:
    rules = Rules(proxies=(ipaddress.ip_network("192.0.2.0/24"), ipaddress.ip_network("::/0")))
    passed = sent(*CLAIMS, ("x-forwarded-for", "198.51.100.1"), rules=rules)
    assert ("x-forwarded-for", f"203.0.113.1, 198.51.100.1, {PEER}") in passed
    assert [name for name, _ in passed].count("x-forwarded-for") == 1
    assert ("x-forwarded-proto", "https") in passed
    assert "x_forwarded_for" not in dict(passed)
    assert ("x-forwarded-for", "203.0.113.1, fe80::1%eth0") in sent(CLAIMS[0], rules=rules, peer="fe80::1%eth0")


def test_connection_takes_away_what_it_lists() -> None:
    assert sent(("Connection", "X-Foo, close"), ("x-foo", "1"), ("X-FOO", "2"), ("x_foo", "3"), ("x-bar", "4")) == [
        ("x-bar", "4"), *OWN,
    ]  # fmt: skip


def test_connection_takes_away_neither_what_the_router_sets_nor_what_describes_the_request() -> None:
    listed = "x-request-id, x-forwarded-for, host, content-length, content-type, authorization"
    kept = [("host", "h"), ("content-length", "1"), ("content-type", "a/b"), ("authorization", "secret")]
    assert sent(("connection", listed), *kept, checks=True) == [*kept, *OWN]
    rules = Rules(proxies=(ipaddress.ip_network(PEER),))
    assert ("x-real-ip", "a") in sent(("connection", "x-real-ip"), ("x-real-ip", "a"), rules=rules)


def test_a_second_spelling_of_a_name_does_not_pass_beside_the_first() -> None:
    assert sent(("content-length", "1"), ("Content_Length", "2"), ("my_header", "3")) == [
        ("content-length", "1"), ("my_header", "3"), *OWN,
    ]  # fmt: skip


def test_a_model_does_not_decide_which_pages_read_its_answers() -> None:
    assert to_caller([(b"Access-Control-Allow-Origin", b"*"), (b"Vary", b"Origin")]) == [(b"vary", b"Origin")]


def test_an_answer_loses_what_is_of_one_hop() -> None:
    given = [
        (b"Connection", b"x-foo, Content-Type"), (b"X-Foo", b"1"), (b"Content-Type", b"text/plain"), (b"Server", b"s"),
        (b"Keep-Alive", b"timeout=5"), (b"Ekiben-Model", b"churn"), (b"X-Request-ID", b"r"),
    ]  # fmt: skip
    assert to_caller(given) == [(b"content-type", b"text/plain"), (b"ekiben-model", b"churn")]
