"""What leaves this machine holds no secret, whatever service it is of, and everything else as it was."""

import json

import pytest

from trainer.runtime.redaction import without_secret_values, without_secrets

SECRETS = {
    "Hub": "hf_" + "a1B2" * 6,
    "GitHub": "ghp_" + "a1B2" * 9,
    "GitHub, fine-grained": "github_pat_" + "a1B2" * 9,
    "GitLab": "glpat-" + "a1B2" * 5,
    "OpenAI": "sk-proj-" + "a1B2" * 8,
    "AWS": "AKIA" + "A1B2" * 4,
    "Google": "AIza" + "a1B2" * 9,
    "Slack": "xoxb-" + "1234567890-" * 2,
    "JWT": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJtZSJ9.c2lnbmF0dXJl",
    "private key": "-----BEGIN RSA PRIVATE KEY-----\nabc\n-----END RSA PRIVATE KEY-----",
}
PLAIN = {
    "eos_token": "<|end|>",
    "pad_token": "<pad>",
    "max_new_tokens": 20,
    "recipe_hash": "0123456789abcdef" * 4,
    "revision": "c" * 40,
    "method": "task-oriented",
    "keys": ["tokens", "https://host/path?rows=8", "a key: value", "risk-adjusted-and-long-enough-to-be-one"],
}


@pytest.mark.parametrize("service", SECRETS)
def test_a_key_is_found_by_its_form_wherever_it_stands(service: str) -> None:
    secret = SECRETS[service]
    for text in (secret, f"x {secret}, y", json.dumps({"note": f"use {secret}"})):
        cleaned = without_secrets(text)
        assert "[secret removed]" in cleaned and secret not in cleaned and secret[8:] not in cleaned
    assert secret[8:] not in json.dumps(without_secret_values({"a": [{"b": secret}]}))


def test_a_secret_in_an_address_or_a_header_goes_and_the_rest_stays() -> None:
    assert without_secrets("https://me:pass@host/x") == "https://me:[secret removed]@host/x"
    assert without_secrets("s3://b/k?X-Amz-Signature=abc&rows=8") == "s3://b/k?X-Amz-Signature=[secret removed]&rows=8"
    assert without_secrets("Authorization: Bearer abcdefgh12") == "Authorization: Bearer [secret removed]"


def test_a_key_that_says_that_its_value_is_secret_is_believed() -> None:
    names = [
        "hub_token",
        "token",
        "password",
        "wandb-api-key",
        "AWS_SECRET_ACCESS_KEY",
        "client_secret",
        "apiKey",
        "authToken",
    ]
    assert set(without_secret_values(dict.fromkeys(names, "abc")).values()) == {"[secret removed]"}
    assert without_secret_values({"hub_token": None, "token": {"x": 1}}) == {"hub_token": None, "token": {"x": 1}}


def test_what_the_environment_keeps_secret_is_taken_out_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef" * 2)
    monkeypatch.setenv("DB_PASSWORD", "horse")  # short enough to be a word
    assert without_secrets("a" + "0123456789abcdef" * 2 + " horse") == "a[secret removed] horse"


def test_what_is_no_secret_stays() -> None:
    assert without_secret_values(PLAIN) == PLAIN
    assert without_secrets(json.dumps(PLAIN)) == json.dumps(PLAIN)
