"""What leads to a person or opens a door: e-mail addresses, phone numbers, public IP addresses, keys.

datatrove's own formatter knows e-mail and IPv4 addresses, and puts other addresses that look real in their place.
Keys are those of `hub.credentials`, by their shapes alone: what this process holds would differ between machines.
"""

import ipaddress
import re
from collections.abc import Iterable

from datatrove.pipeline.formatters.base import BaseFormatter

from bmtk.hub.credentials import SHAPE, URL_LOGIN

# Lengths are bounded, so that no text takes time in proportion to the square of its length.
EMAIL = re.compile(r"(?<![\w.+%-])[\w.+%-]{1,64}@(?:[\w-]{1,63}\.){1,8}[A-Za-z]{2,24}(?![\w-])")
OCTET = r"(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
# Not within a longer number such as a version (1.2.3.4.5); of IPv6 only global unicast, which begins with 2 or 3.
IPV4 = re.compile(rf"(?<![\w.])(?:{OCTET}\.){{3}}{OCTET}(?!\.?\w)", re.ASCII)
IPV6 = re.compile(r"(?<![\w:.])[23][0-9A-Fa-f]{3}:(?:[0-9A-Fa-f]{0,4}:){1,6}[0-9A-Fa-f]{0,4}(?![\w:])", re.ASCII)
SEPARATOR = r"[ .\-/]?"
PHONE = re.compile(
    rf"(?<![\w+.,-])(?:"
    rf"(?:\+|00)[1-9]\d{{0,2}}(?:{SEPARATOR}(?:\(\d{{1,5}}\)|\d{{1,5}})){{2,6}}"  # with a country code
    rf"|(?:1[ .-]?)?(?:\([2-9]\d\d\) ?|[2-9]\d\d[ .-])[2-9]\d\d[ .-]\d{{4}}"  # North America
    rf"|1[3-9]\d[ -]?\d{{4}}[ -]?\d{{4}}"  # mobile phones in China
    rf")(?![\w-]|[.,]\d)",
    re.ASCII,
)
# Other national numbers are like any number, but for the word before them.
NAMED_PHONE = re.compile(
    r"(?i)((?<!\w)(?:tel|phone|telephone|fax|mobile|telefon|电话|手机)[.:：]{0,2} ?)\(?0[\d ()/-]{5,18}\d(?!\w)"
)
DIGITS = range(8, 16)  # of a number with its country code; E.164 allows 15


class Scrub(BaseFormatter):
    """Puts [email], [phone], [ip] and [key] in the place of what it finds."""

    name = "scrub"

    def __init__(self, kinds: Iterable[str]):
        super().__init__()
        self.kinds = tuple(kinds)

    def format(self, text: str) -> str:
        return scrubbed(text, self.kinds)


def scrubbed(text: str, kinds: Iterable[str]) -> str:
    """The text without what `kinds` name: "key", "email", "ip", "phone"."""
    kinds = set(kinds)
    if "key" in kinds:  # before the others: a login within a URL looks like an e-mail address
        text = URL_LOGIN.sub("[key]", SHAPE.sub("[key]", text))
    if "email" in kinds and "@" in text:
        text = EMAIL.sub("[email]", text)
    if "ip" in kinds:
        text = IPV6.sub(_public, IPV4.sub(_public, text))
    if "phone" in kinds:
        text = NAMED_PHONE.sub(r"\1[phone]", PHONE.sub(_phone, text))
    return text


def kinds_scrubbed(before: str, after: str) -> list[str]:
    """Which kinds were found, by what stands in their place."""
    marks = {kind: f"[{kind}]" for kind in ("email", "phone", "ip", "key")}
    return [kind for kind, mark in marks.items() if after.count(mark) > before.count(mark)]


def _public(match: re.Match[str]) -> str:
    try:
        return "[ip]" if ipaddress.ip_address(match[0]).is_global else match[0]
    except ValueError:  # not an address
        return match[0]


def _phone(match: re.Match[str]) -> str:
    num_digits = sum(character.isdigit() for character in match[0])
    is_international = match[0].startswith(("+", "00"))
    return match[0] if is_international and num_digits not in DIGITS else "[phone]"
