"""What leads to a person or opens a door is replaced; what only looks like it stays."""

import pytest

pytest.importorskip("datatrove", reason="needs the extra clean")

from bmtk.cleaning.arguments import SCRUBBED
from bmtk.cleaning.scrubbing import kinds_scrubbed, scrubbed

AWS = "AKIA" + "ABCDEFGHI" + "EXAMPLE"
FOUND = [
    ("email", "anna.b+news@mail.example.org"),
    ("email", "anna@例子.example.com".replace("例子", "mail")),
    ("ip", "8.8.8.8"),
    ("ip", "151.101.1.140"),
    ("ip", "2606:4700:4700::1111"),
    ("ip", "2a00:1450:4001:82f:0:0:0:200e"),
    ("phone", "+49 30 5512345"),
    ("phone", "+1 (555) 867-5309"),
    ("phone", "0049-30-5512345"),
    ("phone", "(555) 234-5678"),
    ("phone", "555-867-5309"),
    ("phone", "13800138000"),
    ("phone", "138 0013 8000"),
    ("key", AWS),
    ("key", "hf_" + "x1" * 12),
    ("key", "-----BEGIN RSA PRIVATE " + "KEY-----\nMIIEow\n-----END RSA PRIVATE KEY-----"),
]
INNOCENT = [
    "version 1.2.3.4.5 of the library",
    "the router at 192.168.0.1, and 127.0.0.1 itself",  # private: leads to nobody
    "Chrome/91.0.4472.124 was new",
    "at 12:30:45, on 2024-01-15 or 15.01.2024",
    "std::vector<int>::iterator, a::b and ab:cd:ef",
    "ISBN 978-3-16-148410-0 costs 1,234,567.89",
    "from 1914-1918 some 1 000 000 000 people",
    "the timestamp 1700000000, or 1700000000000",
    "@mention of a user, me @ home, and a@b",
    "a hash d41d8cd98f00b204e9800998ecf8427e",
    "3.14159265358979 and -17.5e10",
    "call 911, or room 555",
]


@pytest.mark.parametrize(("kind", "text"), FOUND)
@pytest.mark.parametrize("around", ["{}", "see {}, please", "({})", "写信给 {} 。", '"{}"', "at {}."])
def test_what_leads_to_a_person_is_replaced_whole(kind, text, around):
    assert scrubbed(around.format(text), SCRUBBED) == around.format(f"[{kind}]")


@pytest.mark.parametrize("text", INNOCENT)
def test_what_only_looks_like_it_stays(text):
    assert scrubbed(text, SCRUBBED) == text


def test_a_number_after_the_word_phone_is_one():
    assert scrubbed("Tel.: 030 123456-78, not 030 123456-78", SCRUBBED) == "Tel.: [phone], not 030 123456-78"
    assert scrubbed("电话：010-62781234", SCRUBBED) == "电话：[phone]"


def test_a_login_within_a_url_is_a_key_and_no_address():
    assert scrubbed("get https://anna:geheim@example.org/x", SCRUBBED) == "get https://[key]@example.org/x"


def test_only_the_kinds_that_are_asked_for_are_replaced():
    text = f"{AWS} 8.8.8.8 anna@example.org 555-867-5309"
    assert scrubbed(text, ["email"]) == f"{AWS} 8.8.8.8 [email] 555-867-5309"
    assert kinds_scrubbed(text, scrubbed(text, SCRUBBED)) == ["email", "phone", "ip", "key"]


def test_scrubbing_twice_changes_nothing_more():
    text = " ".join(text for _, text in FOUND)
    once = scrubbed(text, SCRUBBED)
    assert scrubbed(once, SCRUBBED) == once


def test_keys_are_known_by_their_shape_and_not_by_what_this_process_holds(monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "correct-horse-battery-staple")
    assert scrubbed("correct-horse-battery-staple", SCRUBBED) == "correct-horse-battery-staple"


@pytest.mark.parametrize("unit", ["a.", "1.", "a@", "+1 ", "2001:", "(555) ", "1-", "9" * 50])
def test_a_long_text_takes_no_longer_than_its_length(unit):
    """Quadratic patterns would need minutes for this megabyte."""
    scrubbed(unit * (1_000_000 // len(unit)), SCRUBBED)
