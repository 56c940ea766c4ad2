# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Taking secrets out of texts that leave a host: those that are known, wherever they stand, and what looks like one.

`masking` knows documents and the names in them. A log has neither, and it may hold a password as it is, in base64, in a
URL, or with its quotes escaped.
"""

from __future__ import annotations

import base64
import json
import re
from typing import Any, Iterable, Iterator, List, Match, Pattern, Set, Tuple
from urllib.parse import quote, quote_plus

from .masking import HIDDEN, SHORTEST, is_secret

_PEM = re.compile(
    r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY-----.*?(?:-----END [A-Z0-9 ]*PRIVATE KEY-----|\Z)",
    re.DOTALL,
)
_PEM_TAIL = re.compile(r"(?:^[A-Za-z0-9+/=]{16,}\s*?\n)*^-----END [A-Z0-9 ]*PRIVATE KEY-----", re.MULTILINE)
_LOOKS: Tuple[Pattern[str], ...] = (
    # An Authorization header, whatever stands between its name and its value.
    re.compile(r"(?i)(\b(?:bearer|basic)\b[\s:=]+)[\"']?[A-Za-z0-9+/_.~=-]{8,}"),
    re.compile(r"(?i)(setup[ _-]?token\b[\"']?\s*[:=]?\s*)[\"']?[A-Za-z0-9_-]{8,}"),
    re.compile(r"(://)[^/\s@\"']+@"),
    re.compile(r"()\bsk-[A-Za-z0-9_-]{8,}"),
    re.compile(r"()\b(?:hf|ghp|gho|ghs|glpat|ms|xox[a-z])[_-][A-Za-z0-9_-]{16,}"),
    re.compile(r"()\bAKIA[0-9A-Z]{12,}"),
    re.compile(r"()\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{4,}(?:\.[A-Za-z0-9_-]*)?"),
    re.compile(r"()\$2[abxy]\$\d\d\$[./A-Za-z0-9]{20,}"),
)
_NAMED = re.compile(
    r"(?P<name>[A-Za-z_][\w-]*)(?P<between>\\?[\"']?\s*(?:=|:)\s*)"
    r"(?P<value>\\?\"(?:[^\"\\\n]|\\.)*\"?|'(?:[^'\\\n]|\\.)*'?|[^\s,;&\"'{}()\[\]]+)"
)
_MARK = "\ue000"
"""A character of nobody's that stands for `HIDDEN` meanwhile."""
_WORDS = frozenset(("true", "false", "none", "null", "on", "off", "yes", "no", HIDDEN))


def forms(secret: str) -> Set[str]:
    """All the texts in which a secret may stand somewhere: plain, escaped, encoded for a URL, in base64, in hex."""
    raw = secret.encode("utf-8", "surrogateescape")
    found = {
        secret,
        json.dumps(secret)[1:-1],
        json.dumps(secret, ensure_ascii=False)[1:-1],
        repr(secret)[1:-1],
        secret.replace("$", "$$"),
        secret.replace("'", "'\\''"),
        quote(raw, safe=""),
        quote(raw),
        quote_plus(raw),
        raw.hex(),
    }
    found |= {text.lower() for text in found if "%" in text}
    found |= set(_base64(raw))
    return {text for text in found if len(text) >= SHORTEST}


def _base64(raw: bytes) -> Iterator[str]:
    """What a secret is in base64, wherever in a longer text it begins (`user:password`), without what it shares."""
    for before in range(3):
        encoded = base64.b64encode(bytes(before) + raw).decode()
        # Characters that also depend on the neighbours are no sure sign; two bytes and less leave none.
        start = (0, 2, 3)[before]
        end = len(encoded) - (0, 3, 2)[(before + len(raw)) % 3]
        if end - start >= 6:
            yield encoded[start:end]
            yield encoded[start:end].replace("+", "-").replace("/", "_")


class Scrubber:
    """Takes `secrets`, and what looks like one, out of texts. Those shorter than `masking.SHORTEST` are too common."""

    def __init__(self, secrets: Iterable[str]) -> None:
        self.secrets = sorted({text for text in secrets if len(text.strip()) >= SHORTEST})
        known = {form for secret in self.secrets for form in (*forms(secret), *forms(secret.strip()))}
        known = {form.replace(HIDDEN, _MARK) for form in known} - {_MARK}
        self._known: List[str] = sorted(known, key=len, reverse=True)

    def clean(self, text: str) -> str:
        """The text with every secret replaced."""
        text = self.known_out(text)
        text = _PEM_TAIL.sub(HIDDEN, _PEM.sub(HIDDEN, text))
        for pattern in _LOOKS:
            text = pattern.sub(_keep_lead, text)
        return _NAMED.sub(_named, text)

    def clean_data(self, value: Any) -> Any:
        """Plain data with every text in it cleaned, names of mappings too."""
        if isinstance(value, dict):
            return {self.known_out(str(name)): self.clean_data(item) for name, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.clean_data(item) for item in value]
        if isinstance(value, (int, float)) and not isinstance(value, bool) and self.left_in(str(value)):
            return HIDDEN
        return self.clean(value) if isinstance(value, str) else value

    def known_out(self, text: str) -> str:
        """The text with the known secrets replaced, and nothing else."""
        # What stands for a secret may have another one in it, such as the word "hidden".
        text = text.replace(HIDDEN, _MARK)
        for form in self._known:
            text = text.replace(form, _MARK)
        return text.replace(_MARK, HIDDEN)

    def left_in(self, text: str) -> bool:
        """Whether a known secret still stands in a text, in any of its forms."""
        text = text.replace(HIDDEN, _MARK)
        return any(form in text for form in self._known)


def _keep_lead(match: Match[str]) -> str:
    tail = "@" if match.group(0).endswith("@") else ""
    return f"{match.group(1)}{HIDDEN}{tail}"


def _named(match: Match[str]) -> str:
    """A value that stands behind a name that speaks of a secret; words and short numbers are none."""
    value = match.group("value")
    bare = value.strip("\\\"'")
    if not is_secret(match.group("name")) or not bare or bare.lower() in _WORDS or HIDDEN in value:
        return match.group(0)
    if bare.replace(".", "").isdigit() and len(bare) < 6:
        return match.group(0)
    opening = re.match(r"\\?[\"']?", value)
    mark = opening.group(0) if opening else ""
    closing = mark if mark and value.endswith(mark) and len(value) > len(mark) else ""
    return f"{match.group('name')}{match.group('between')}{mark}{HIDDEN}{closing}"
