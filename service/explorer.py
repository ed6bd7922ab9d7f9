"""The page at `/`: look an item up, walk along its neighbors, and see why they are near. One file, nothing to build."""

import re
from base64 import b64encode
from functools import lru_cache
from hashlib import sha256
from pathlib import Path


@lru_cache
def page() -> tuple[bytes, bytes]:
    """The page, and the policy under which a browser runs nothing in it but its own script and style."""
    content = Path(__file__).with_name("explorer.html").read_bytes()
    allowed = {
        tag: " ".join(f"'sha256-{b64encode(sha256(part).digest()).decode()}'" for part in _inside(tag, content))
        for tag in (b"script", b"style")
    }
    policy = (
        f"default-src 'none'; script-src {allowed[b'script']}; style-src {allowed[b'style']}; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return content, policy.encode()


def _inside(tag: bytes, content: bytes) -> list[bytes]:
    return re.findall(rb"<%b>(.*?)</%b>" % (tag, tag), content, flags=re.DOTALL)
