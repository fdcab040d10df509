"""What is shown of a source holds no part that may be a secret, however the source is written."""

from __future__ import annotations

import itertools

import pytest

from lora.errors import LoraError
from lora.fetch.redaction import HIDDEN, redact_url
from lora.fetch.sources import Reference, parse

SHOWN = {
    "https://a:b@h.example:8/p/f.bin?x=1#y": "https://h.example:8/p/f.bin",
    "HTTPS://h.example/p?x": "https://h.example/p",
    "http://[2001:db8::1]:8/f.pt?s": "http://[2001:db8::1]:8/f.pt",
    "https://h.example/a b/f%20g.pt": "https://h.example/a b/f%20g.pt",
    "https://h.example": "https://h.example",
    "user/repo": "user/repo",
    "hf-internal-testing/tiny": "hf-internal-testing/tiny",
    "user/repo@v1/x.pt": "user/repo@v1/x.pt",
    "user/repo@refs/pr/3": "user/repo@refs/pr/3",
    "hf://user/repo@v1/x.pt": "hf://user/repo@v1/x.pt",
    "civitai:1@2": "civitai:1@2",
    "urn:air:sdxl:lora:civitai:1@2": "urn:air:sdxl:lora:civitai:1@2",
    "name.safetensors": "name.safetensors",
    "folder/näme (1)+b": "folder/näme (1)+b",
    "https://h/f?token=secret&next=https://x/y": "https://h/f",
    "https://u:se://cret@h/f": HIDDEN,
    "https://u:12/secret@h/f": f"https://u:12/{HIDDEN}",
    "https://h/f%3Ftoken=secret": f"https://h/{HIDDEN}",
    "https://h/a/token=secret/f": f"https://h/a/{HIDDEN}",
    "https://h;token=secret/f": f"https://{HIDDEN}",
    "https://h\\?token=secret": f"https://{HIDDEN}",
    "https:/h/x?token=secret": HIDDEN,
    "http://[bad?token=secret": HIDDEN,
    "//u:secret@h/x": f"//{HIDDEN}",
    "u:secret@h/x": HIDDEN,
    "user/repo@hf_secret": f"user/repo@{HIDDEN}",
    "user/repo/hf_secretsecret": f"user/repo/{HIDDEN}",
    "user/repo/f.pt?token=secret": f"user/repo/{HIDDEN}",
    "name&token=secret": HIDDEN,
    "https://h/a\n?token=secret": HIDDEN,
    "": "",
}


@pytest.mark.parametrize("text", SHOWN)
def test_what_is_shown_of_a_source(text: str) -> None:
    assert redact_url(text) == SHOWN[text]


BEFORE = ["", "https://", "http:/", "//", "hf://", "civitai:1", "user/repo", "C:\\", "s3://b/", "@"]
BETWEEN = ["?token=", "#", "?a=1&b=", "@h?x=", ";k=", "?n=https://x/", "\\?", "%3Fk=", "&k=", "?"]
AFTER = ["", "://x", "@h/f", "/f.safetensors", "&next=https://x/y", "?x", "#y", "\n"]


def test_no_spelling_of_a_query_or_a_user_shows_its_value() -> None:
    for before, between, after in itertools.product(BEFORE, BETWEEN, AFTER):
        for host in ("", "h.example", "h.example/f.safetensors", "u:p@h.example"):
            text = f"{before}{host}{between}canary{after}"
            assert "canary" not in redact_url(text), text
            try:
                parse(Reference(text))
            except LoraError as error:
                assert "canary" not in str(error), text
