"""Settings that are wrong stop the start, and the message says where to look."""

from __future__ import annotations

from pathlib import Path

import pytest

from pronghorn.errors import UsageError
from pronghorn.settings import LlamaCppSettings, Settings, UpstreamSettings, default_data_dir, load


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return tmp_path / "pronghorn.toml"


def test_without_a_file_everything_has_its_default() -> None:
    assert load(None, {}) == Settings(data_dir=str(default_data_dir()))


def test_a_file_sets_values_and_the_command_line_lies_over_it(config: Path) -> None:
    config.write_text('port = 9000\nhost = "::1"\n')
    settings = load(config, {"port": 9001, "data_dir": "/data"})
    assert (settings.port, settings.host, settings.data_dir) == (9001, "::1", "/data")


def test_tables_become_nested_settings(config: Path) -> None:
    config.write_text(
        """
        line_timeout_s = 60
        [llamacpp]
        slots = 2
        [[upstream]]
        url = "http://a/v1"
        models = ["m"]
        [[upstream]]
        url = "http://b/v1"
        """
    )
    settings = load(config, {})
    assert settings.upstream == (UpstreamSettings("http://a/v1", models=("m",)), UpstreamSettings("http://b/v1"))
    assert settings.llamacpp == LlamaCppSettings(slots=2)
    assert settings.line_timeout_s == 60.0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prot = 1", ["unknown field `prot`"]),
        ("port = '1'", ["Expected `int`, got `str`", "$.port"]),
        ("port = 65536", ["<= 65535", "$.port"]),
        ("port = true", ["Expected `int`", "$.port"]),
        ("workers = 0", [">= 1", "$.workers"]),
        ("line_timeout_s = 0", ["> 0", "$.line_timeout_s"]),
        ("line_timeout_s = nan", ["> 0", "$.line_timeout_s"]),
        ("drain_s = -1", [">= 0", "$.drain_s"]),
        ("line_bytes_max = 1.5", ["Expected `int`", "$.line_bytes_max"]),
        ("[llamacpp]\nslot = 1", ["unknown field `slot`", "$.llamacpp"]),
        ("[llamacpp]\nslots = 0", [">= 1", "$.llamacpp.slots"]),
        ("[[upstream]]\nurl = 'x'\n[[upstream]]\nurl = 1", ["Expected `str`", "$.upstream[1].url"]),
        ("[[upstream]]", ["missing required field `url`", "$.upstream[0]"]),
        ("[upstream]\nurl = 'x'", ["Expected `array`", "$.upstream"]),
        ("port = ", ["is not TOML"]),
    ],
)
def test_a_wrong_setting_is_named_with_its_file(config: Path, text: str, said: list[str]) -> None:
    config.write_text(text)
    with pytest.raises(UsageError) as caught:
        load(config, {})
    for part in (str(config), *said):
        assert part in str(caught.value)


def test_a_wrong_value_on_the_command_line_says_so() -> None:
    with pytest.raises(UsageError, match=r"command line: Expected `int`.*\$\.port"):
        load(None, {"port": "x"})


def test_a_file_that_cannot_be_read_is_named(config: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot read .*pronghorn\.toml: No such file"):
        load(config, {})
    config.write_bytes(b"host = '\xff'")
    with pytest.raises(UsageError, match=r"pronghorn\.toml is not TOML"):
        load(config, {})
