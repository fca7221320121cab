"""Where webhooks may go: every way to write an address that only the server can reach is refused."""

from __future__ import annotations

import pytest

from pronghorn.domain.addresses import AllowedHosts, Receiver, Refused, is_public, judge_url

NOBODY = AllowedHosts(())


@pytest.mark.parametrize(
    "address",
    [
        "1.1.1.1",
        "8.8.8.8",
        "9.255.255.255",
        "11.0.0.0",
        "100.63.255.255",
        "100.128.0.0",
        "126.255.255.255",
        "128.0.0.1",
        "169.253.255.255",
        "172.15.255.255",
        "172.32.0.0",
        "192.167.255.255",
        "192.169.0.0",
        "198.17.255.255",
        "198.20.0.0",
        "223.255.255.255",
        "2001:4860:4860::8888",
        "2606:4700:4700::1111",
        "2a00:1450:4001:81b::200e",
        "64:ff9b::8.8.8.8",
        "64:ff9b::808:808",
    ],
)
def test_public_addresses(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0",
        "0.1.2.3",
        "10.0.0.0",
        "10.255.255.255",
        "100.64.0.0",
        "100.100.100.200",
        "100.127.255.255",
        "127.0.0.1",
        "127.255.255.255",
        "169.254.0.0",
        "169.254.169.254",
        "172.16.0.0",
        "172.31.255.255",
        "192.0.0.1",
        "192.0.0.170",
        "192.0.2.1",
        "192.88.99.1",
        "192.168.0.0",
        "192.168.255.255",
        "198.18.0.0",
        "198.19.255.255",
        "198.51.100.1",
        "203.0.113.255",
        "224.0.0.1",
        "239.255.255.255",
        "240.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "::2",
        "::127.0.0.1",
        "::8.8.8.8",
        "::ffff:127.0.0.1",
        "::ffff:7f00:1",
        "::ffff:10.0.0.1",
        "::ffff:169.254.169.254",
        "::ffff:8.8.8.8",
        "::ffff:0:127.0.0.1",
        "64:ff9b::127.0.0.1",
        "64:ff9b::10.0.0.1",
        "64:ff9b::a9fe:a9fe",
        "64:ff9b::192.168.1.1",
        "64:ff9b::100.64.0.1",
        "64:ff9b::",
        "64:ff9b:1::8.8.8.8",
        "64:ff9b:0:0:0:1:808:808",
        "100::1",
        "2001::1",
        "2001:0:4136:e378:8000:63bf:3fff:fdd2",
        "2001:2::1",
        "2001:10::1",
        "2001:20::1",
        "2001:db8::1",
        "2002:7f00:1::",
        "2002:a00:1::1",
        "2002:c0a8:101::1",
        "2002:808:808::1",
        "3fff::1",
        "5f00::1",
        "fc00::1",
        "fd00:ec2::254",
        "fdff:ffff::1",
        "fe80::1",
        "fe80::1%eth0",
        "2606:4700:4700::1111%eth0",
        "febf::1",
        "fec0::1",
        "ff00::",
        "ff02::1",
        "ff0e::1",
        "4000::1",
        "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff",
        "",
        "localhost",
        "127.1",
        "2130706433",
        "0177.0.0.1",
        "0x7f.0.0.1",
        "010.8.8.8",
        " 8.8.8.8",
        "8.8.8.8/32",
    ],
)
def test_all_other_addresses(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize(
    ("url", "receiver"),
    [
        ("https://hooks.example", Receiver("https", "hooks.example", 443, "/")),
        ("HTTPS://Hooks.Example/A?b=c&d#e", Receiver("https", "hooks.example", 443, "/A?b=c&d")),
        ("https://hooks.example:8443/in", Receiver("https", "hooks.example", 8443, "/in")),
        ("https://hooks.example./in", Receiver("https", "hooks.example.", 443, "/in")),
        ("https://8.8.8.8/", Receiver("https", "8.8.8.8", 443, "/")),
        ("https://[2606:4700:4700::1111]:444/", Receiver("https", "2606:4700:4700::1111", 444, "/")),
        ("https://xn--bcher-kva.example/%C3%A9", Receiver("https", "xn--bcher-kva.example", 443, "/%C3%A9")),
        ("https://a_b.example/", Receiver("https", "a_b.example", 443, "/")),
        ("https://127.0.0.1.nip.io/", Receiver("https", "127.0.0.1.nip.io", 443, "/")),
        ("https://10.example/", Receiver("https", "10.example", 443, "/")),
    ],
)
def test_accepted_urls(url: str, receiver: Receiver) -> None:
    assert judge_url(url, NOBODY) == receiver


NOT_PUBLIC = "names an address that is not public"
NOT_HTTPS = "must start with https://"
NOT_PLAIN = "must be written in ASCII, with everything else percent-encoded and host names in Punycode"
NOT_A_URL = "is not a valid URL"


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://hooks.example/", NOT_HTTPS),
        ("http://8.8.8.8/", NOT_HTTPS),
        ("ftp://hooks.example/", NOT_HTTPS),
        ("file:///etc/passwd", NOT_HTTPS),
        ("gopher://127.0.0.1:70/_", NOT_HTTPS),
        ("hooks.example/in", NOT_HTTPS),
        ("//hooks.example/in", NOT_HTTPS),
        ("", NOT_HTTPS),
        ("https:hooks.example", NOT_A_URL),
        ("https://", NOT_A_URL),
        ("https:///in", NOT_A_URL),
        ("https://:443/", NOT_A_URL),
        ("https://hooks.example:0/", NOT_A_URL),
        ("https://hooks.example:65536/", NOT_A_URL),
        ("https://hooks.example:x/", NOT_A_URL),
        ("https://hooks..example/", NOT_A_URL),
        ("https://-hooks.example/", NOT_A_URL),
        ("https://127%2e0.0.1/", NOT_A_URL),
        ("https://[::1/", NOT_A_URL),
        ("https://[hooks.example]/", NOT_A_URL),
        ("https://[fe80::1%25eth0]/", NOT_A_URL),
        (f"https://{'a' * 64}.example/", NOT_A_URL),
        (f"https://{'a.' * 127}example/", NOT_A_URL),
        ("https://user@hooks.example/", "must not hold a user name or password"),
        ("https://user:secret@hooks.example/", "must not hold a user name or password"),
        ("https://hooks.example@127.0.0.1/", "must not hold a user name or password"),
        ("https://127.0.0.1\\@hooks.example/", NOT_PLAIN),
        ("https://hooks.example/a b", NOT_PLAIN),
        ("https://hooks.example/\r\nX-Injected: 1", NOT_PLAIN),
        ("https://ho\toks.example/", NOT_PLAIN),
        ("https://hooks.example/\x00", NOT_PLAIN),
        (" https://hooks.example/", NOT_PLAIN),
        ("https://bücher.example/", NOT_PLAIN),
        ("https://\uff11\uff12\uff17.0.0.1/", NOT_PLAIN),
        ("https://127\u30020\u30020\u30021/", NOT_PLAIN),
        ("https://localhost/", NOT_PUBLIC),
        ("https://LOCALHOST.:8443/", NOT_PUBLIC),
        ("https://api.localhost/", NOT_PUBLIC),
        ("https://127.0.0.1/", NOT_PUBLIC),
        ("https://127.0.0.1./", NOT_PUBLIC),
        ("https://127.1/", NOT_PUBLIC),
        ("https://127.0.1/", NOT_PUBLIC),
        ("https://2130706433/", NOT_PUBLIC),
        ("https://0x7f000001/", NOT_PUBLIC),
        ("https://0X7F.0.0.1/", NOT_PUBLIC),
        ("https://0x7f.1/", NOT_PUBLIC),
        ("https://0177.0.0.1/", NOT_PUBLIC),
        ("https://017700000001/", NOT_PUBLIC),
        ("https://0/", NOT_PUBLIC),
        ("https://0x/", NOT_PUBLIC),
        ("https://134744072/", NOT_PUBLIC),
        ("https://1.2.3.4.5/", NOT_PUBLIC),
        ("https://256.256.256.256/", NOT_PUBLIC),
        ("https://169.254.169.254/latest/meta-data/", NOT_PUBLIC),
        ("https://10.0.0.1/", NOT_PUBLIC),
        ("https://[::]/", NOT_PUBLIC),
        ("https://[::1]/", NOT_PUBLIC),
        ("https://[0:0:0:0:0:0:0:1]/", NOT_PUBLIC),
        ("https://[::ffff:127.0.0.1]/", NOT_PUBLIC),
        ("https://[::ffff:7f00:1]/", NOT_PUBLIC),
        ("https://[64:ff9b::10.0.0.1]/", NOT_PUBLIC),
        ("https://[fd00::1]/", NOT_PUBLIC),
    ],
)
def test_refused_urls(url: str, reason: str) -> None:
    assert judge_url(url, NOBODY) == Refused(reason)


@pytest.mark.parametrize(
    ("entry", "url", "accepted"),
    [
        ("hooks.internal", "http://hooks.internal/", True),
        ("hooks.internal", "http://hooks.internal:8080/", True),
        ("hooks.internal", "https://HOOKS.internal./", True),
        ("Hooks.Internal", "http://hooks.internal/", True),
        ("hooks.internal:8080", "http://hooks.internal:8080/", True),
        ("hooks.internal:8080", "http://hooks.internal/", False),
        ("hooks.internal:80", "http://hooks.internal/", True),
        ("hooks.internal", "http://a.hooks.internal/", False),
        ("hooks.internal", "ftp://hooks.internal/", False),
        ("127.0.0.1:9", "http://127.0.0.1:9/", True),
        ("127.0.0.1:9", "http://127.0.0.1:10/", False),
        ("127.0.0.1", "https://127.1/", False),
        ("[::1]", "http://[::1]:9/", True),
        ("[::1]:9", "http://[::1]:9/", True),
        ("[::1]:9", "http://[::1]/", False),
        ("localhost", "http://localhost:9/", True),
    ],
)
def test_hosts_that_the_operator_allows(entry: str, url: str, accepted: bool) -> None:
    assert isinstance(judge_url(url, AllowedHosts([entry])), Receiver) is accepted


def test_a_host_header_names_the_port_unless_it_is_the_schemes_own() -> None:
    receivers = [judge_url(url, NOBODY) for url in ("https://a.example:443/", "https://[2606::1]:444/")]
    assert [receiver.authority for receiver in receivers if isinstance(receiver, Receiver)] == [
        "a.example",
        "[2606::1]:444",
    ]
