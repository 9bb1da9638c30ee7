"""Addresses with secrets: of a PostgreSQL, of a webhook. The secret is in no message."""

from __future__ import annotations

import re
from pathlib import Path

from tests.fuzz.judge import Surprise, Target
from tripletkit import notify
from tripletkit.config import Config, load, with_values
from tripletkit.errors import ConfigError, TripletkitError
from tripletkit.tune import postgresql
from tripletkit.tune.retry import redacted

SECRET = "s3cr3t"


def _check(error: TripletkitError, given: str) -> None:
    said = f"{error.message} {error.hint}"
    if SECRET in said:
        raise Surprise("a secret is in the message") from None
    if error.__cause__ is not None and SECRET in str(error.__cause__):
        raise Surprise("a secret is in the cause") from None
    del given


def _dsn(data: bytes) -> None:
    url = data.decode(errors="surrogateescape")
    try:
        with_values(Config(), tuning={"storage_url": url})
        config = load(overrides=[f"tuning.storage_url={url}"], environ={})
    except ConfigError as error:
        _check(error, url)
        raise
    try:
        postgresql._address(config.tuning)
        postgresql.is_private(config.tuning)
    except TripletkitError as error:
        _check(error, url)
        raise
    # What passes has no password in the place of one, so it may be printed.
    if re.search(rf"://[^/?#@]*:{SECRET}@", url) or re.search(rf"password={SECRET}", url):
        raise Surprise("a password passed")
    shown = redacted(url)
    assert not re.search(rf"://[^:/?#\s]*:{SECRET}@", shown)


def _webhook(data: bytes) -> None:
    text = data.decode(errors="surrogateescape")
    Path("address").write_bytes(data)
    for given in (text, "address"):
        try:
            found = notify.address(given)
        except ConfigError as error:
            _check(error, given)
            continue
        if found is not None:
            assert found.isascii()
            assert found.isprintable()
            assert found.lower().startswith("http")
            Path("kept").unlink(missing_ok=True)
            notify.keep(Path("kept"), found)
            assert Path("kept").stat().st_mode & 0o777 == 0o600


def _urls() -> list[bytes]:
    urls = (
        "postgresql://user@host:5432/db", f"postgresql://user:{SECRET}@host/db", "postgres://h/d?sslmode=disable",
        f"postgresql://h/d?password={SECRET}", "postgresql+psycopg2://u@[::1]:5432/d", f"postgresql://u:{SECRET}/x@h/d",
        f"postgresql://u:{SECRET}#@h/d", f"postgresql://u:{SECRET}?a@h/d", f"postgresql://u@h:{SECRET}/d", "postgresql://[",
        f"postgresql://u:{SECRET}@@h", "postgresql://h/d\0", f"postgresql://u@h/d?sslpassword={SECRET}", "postgresql://%",
        f"postgresql://h/d?pass%77ord={SECRET}", "postgresql:///d?host=/tmp", f"postgresql://u:{SECRET} @h/d",
        f"postgresql://h/d;password={SECRET}", f"postgresql:\\\\u:{SECRET}@h/d", f"postgresql://u%3A{SECRET}@h/d",
        "postgresql://h,h2:1,2/d", f"host=h password={SECRET}", f"postgresql://[u:{SECRET}@h/d", "postgresql://h\ud800/d",
    )  # fmt: skip
    return [url.encode(errors="surrogatepass") for url in urls]


def _hooks() -> list[bytes]:
    urls = (
        f"https://hooks.example.org/{SECRET}", f"http://10.0.0.1:8080/{SECRET}", f"https://u:{SECRET}@h/", "~nobody-here/x",
        f"http://example.org/{SECRET}", f"https://[::1/{SECRET}", f"https://h:99999/{SECRET}", f"ftp://h/{SECRET}", ".",
        f"https://h/{SECRET}\n", f" https://h/{SECRET}", f"https://xn--{'a' * 80}/{SECRET}", f"https://h\u00fc/{SECRET}", "a\0b",
        f"https://{'a.' * 200}org/{SECRET}", f"https:///{SECRET}", "x" * 300, f"http://[fe80::1%25eth0]/{SECRET}", "/dev/null",
        f"http://127.1/{SECRET}", f"http://0/{SECRET}", f"https://h:/{SECRET}", f"http://localhost.:1/{SECRET}", "",
    )  # fmt: skip
    return [url.encode() for url in urls]


WORDS = [b"postgresql://", b"https://", b"http://", SECRET.encode(), b"@", b":", b"/", b"?", b"#", b"[", b"]", b"%00",
         b"password=", b"%3A", b"\0", b"localhost", b"10.0.0.1", b"&", b"\\", b"'", b"host="]  # fmt: skip
DSN = Target(_dsn, _urls, WORDS)
WEBHOOK = Target(_webhook, _hooks, WORDS)
