"""Settings: order of sources, the place and words of every error, and keys that stay hidden."""

from collections.abc import Mapping
from pathlib import Path

import pytest
from pydantic import SecretStr, ValidationError

from opta_lmx.config import Config, ConfigError, LoggingConfig, ServerConfig, find_config, load_config
from opta_lmx.config_models import ModelsConfig

SECRET = "sk-very-secret-1234"


def load(
    directory: Path, text: str, environ: Mapping[str, str] | None = None, flags: Mapping[str, object] | None = None
) -> Config:
    file = directory / "config.yaml"
    file.write_text(text, encoding="utf-8")
    return load_config(file, environ=environ or {}, flags=flags)


def load_error(directory: Path, text: str, environ: Mapping[str, str] | None = None) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load(directory, text, environ)
    return caught.value


@pytest.mark.parametrize(
    ("text", "line", "key", "reason"),
    [
        ("server:\n  host: localhost\n  prot: 1\n", 3, "server.prot", "unknown key; the nearest is 'port'"),
        ("memroy: {}\n", 1, "memroy", "unknown key; the nearest is 'memory'"),
        (
            "logging:\n  zzz: 1\n",
            2,
            "logging.zzz",
            "unknown key; known here: level, format, file",
        ),
        (
            "models:\n  per_model:\n    a/b:\n      ttl: 5\n",
            4,
            "models.per_model.a/b.ttl",
            "unknown key; known here: ttl_seconds, context_length, kv_bits, tool_format, reasoning_format, pinned",
        ),
        (
            "scheduling:\n  prefix_cache:\n    ram_byte: 1\n",
            3,
            "scheduling.prefix_cache.ram_byte",
            "unknown key; the nearest is 'ram_bytes'",
        ),
        ("server:\n  port: http\n", 2, "server.port", "should be a valid integer"),
        ("server:\n  port: '80'\n", 2, "server.port", "should be a valid integer"),
        ("server:\n  port: true\n", 2, "server.port", "should be a valid integer"),
        ("server:\n  docs: 1\n", 2, "server.docs", "should be a valid boolean"),
        ("server: 80\n", 1, "server", "should be a mapping of keys to values"),
        ("models:\n  aliases: [a]\n", 2, "models.aliases", "should be a mapping of keys to values"),
        ("models:\n  auto_load: a\n", 2, "models.auto_load", "should be a list"),
        ("models:\n  auto_load:\n    - a\n    - 7\n", 4, "models.auto_load.1", "should be text; put it in quotes"),
        ("models:\n  aliases:\n    7: a\n", 3, "models.aliases.7", "should be text; put it in quotes"),
        ("models:\n  presets:\n    p: {}\n", 3, "models.presets.p.model", "is missing"),
        ("models:\n  per_model:\n    m: {kv_bits: 5}\n", 3, "models.per_model.m.kv_bits", "should be 4 or 8"),
        (
            "models:\n  presets:\n    p: {model: m, reasoning_format: klingon}\n",
            3,
            "models.presets.p.reasoning_format",
            "should be 'command', 'gemma', 'harmony', 'mistral', 'seed', 'think' or 'none'",
        ),
        ("server:\n\n  port: 65536\n", 3, "server.port", "should be less than or equal to 65535"),
        ("memory: {max_memory_percent: 0}\n", 1, "memory.max_memory_percent", "should be greater than or equal to 1"),
        ("server: {drain_seconds: .nan}\n", 1, "server.drain_seconds", "should be a finite number"),
        ("logging: {format: xml}\n", 1, "logging.format", "should be 'json' or 'console'"),
        (
            "server:\n  max_body_bytes: 10 apples\n",
            2,
            "server.max_body_bytes",
            "should be a size such as 10485760, 10MiB or 1.5GB",
        ),
        (
            "scheduling: {prefix_cache: {ram_bytes: -1}}\n",
            1,
            "scheduling.prefix_cache.ram_bytes",
            "should be a whole number of bytes, 0 or more",
        ),
        ("server:\n  port: 1\n  port: 2\n", 3, "server.port", "is set twice, first on line 2"),
        ("server: {}\nmodels: {}\nserver: {}\n", 3, "server", "is set twice, first on line 1"),
        ("server:\n\tport: 1\n", 2, None, "is not YAML: found character '\\t' that cannot start any token"),
        ("server: [\n", 2, None, "is not YAML: expected the node content, but found '<stream end>'"),
        ("- server\n", 1, None, "should be a mapping of sections"),
        ("models: &m\n  aliases: *m\n", 2, "models", "is nested too deeply"),
        ("bell: \a\n", None, None, "is not YAML: unreadable characters"),
    ],
)
def test_error_names_file_line_key_and_reason(
    tmp_path: Path, text: str, line: int | None, key: str | None, reason: str
) -> None:
    """A bad file is refused with the place and the reason, each a field of its own and all of them in the message."""
    error = load_error(tmp_path, text)
    file = str(tmp_path / "config.yaml")
    assert (error.file, error.line, error.key, error.reason) == (file, line, key, reason)
    place = file if line is None else f"{file}:{line}"
    assert str(error) == ": ".join(part for part in (place, key, reason) if part)


def test_file_that_cannot_be_read_is_a_config_error(tmp_path: Path) -> None:
    """A directory, or bytes that are not text, end in a ConfigError that names the file."""
    with pytest.raises(ConfigError, match="cannot be read: Is a directory") as caught:
        load_config(tmp_path, environ={})
    assert caught.value.file == str(tmp_path)
    (tmp_path / "latin").write_bytes(b"server: \xff")
    with pytest.raises(ConfigError, match="latin: cannot be read: it is not UTF-8 text"):
        load_config(tmp_path / "latin", environ={})


@pytest.mark.parametrize("text", ["", "# nothing\n", "\ufeffserver:\n", "server:\nmodels:\n  per_model:\n    a:\n"])
def test_what_is_left_out_has_its_default(tmp_path: Path, text: str) -> None:
    """An empty file, an empty section and a byte order mark change nothing."""
    assert load(tmp_path, text).server == ServerConfig()


def test_later_sources_win(tmp_path: Path) -> None:
    """A flag beats a variable, a variable beats the file, the file beats the default, key by key."""
    text = "server: {port: 1, drain_seconds: 1, host: localhost}\nlogging: {level: error}\n"
    environ = {"OPTA_LMX__SERVER__PORT": "2", "OPTA_LMX__SERVER__DRAIN_SECONDS": "2", "OPTA_LMX_URL": "unrelated"}
    config = load(tmp_path, text, environ, {"server.port": 3, "models.starter": False})
    assert (config.server.port, config.server.drain_seconds, config.server.host) == (3, 2.0, "localhost")
    assert config.logging.level == "ERROR"
    assert config.models.starter is False
    assert config.server.request_inactivity_seconds == ServerConfig().request_inactivity_seconds


def test_variable_is_yaml_and_replaces_or_amends(tmp_path: Path) -> None:
    """A variable for a mapping replaces it, and one for a key below amends that result."""
    text = "models:\n  aliases: {old: m}\nscheduling:\n  prefix_cache: {ssd_bytes: 7}\n"
    environ = {
        "OPTA_LMX__MODELS__ALIASES__EXTRA": "n",
        "OPTA_LMX__MODELS__ALIASES": "{Big: m}",
        "OPTA_LMX__SCHEDULING__PREFIX_CACHE__RAM_BYTES": "1KiB",
        "OPTA_LMX__MODELS__TTL_SECONDS": "",
    }
    config = load(tmp_path, text, environ)
    assert config.models.aliases == {"Big": "m", "extra": "n"}
    assert (config.scheduling.prefix_cache.ram_bytes, config.scheduling.prefix_cache.ssd_bytes) == (1024, 7)
    assert config.models.ttl_seconds is None


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("OPTA_LMX__SERVER__PROT", "1", "server.prot: unknown key; the nearest is 'port'"),
        ("OPTA_LMX__SERVER__PORT", "x", "server.port: should be a valid integer"),
        ("OPTA_LMX__SERVER__PORT__X", "1", "server.port: should be a valid integer"),
        ("OPTA_LMX__SRVER__PORT", "1", "srver: unknown key; the nearest is 'server'"),
        ("OPTA_LMX__SERVER", "{}", "names no setting; write OPTA_LMX__SECTION__KEY"),
        ("OPTA_LMX__MODELS__ALIASES", "[", "is not YAML: expected the node content, but found '<stream end>'"),
        ("OPTA_LMX__MODELS__ALIASES", "{a: 1}", "models.aliases.a: should be text; put it in quotes"),
    ],
)
def test_error_of_a_variable_names_the_variable(tmp_path: Path, name: str, value: str, message: str) -> None:
    """A bad variable is named in place of a file, also where the file sets the same key."""
    error = load_error(tmp_path, "server: {port: 1}\nmodels:\n  aliases: {a: b}\n", {name: value})
    assert error.file == name
    assert str(error).removeprefix(name).lstrip(":0123456789 ") == message


def test_error_of_a_flag_names_the_command_line(tmp_path: Path) -> None:
    """A flag out of range is placed on the command line, not in the file."""
    with pytest.raises(ConfigError, match=r"^command line: server\.port: should be less than"):
        load(tmp_path, "server: {port: 1}\n", flags={"server.port": 70000})


def test_config_file_is_searched_in_order(tmp_path: Path) -> None:
    """The named file comes first, then the variable's, then the one in the home directory, then none."""
    flag, variable, usual = tmp_path / "flag", tmp_path / "variable", tmp_path / ".opta-lmx" / "config.yaml"
    usual.parent.mkdir()
    for file in (flag, variable, usual):
        file.touch()
    environ = {"OPTA_LMX_CONFIG": str(variable)}
    assert find_config(flag, environ=environ, home=tmp_path) == flag
    assert find_config(None, environ=environ, home=tmp_path) == variable
    assert find_config(None, environ={}, home=tmp_path) == usual
    usual.unlink()
    assert find_config(None, environ={}, home=tmp_path) is None


def test_named_config_file_must_exist(tmp_path: Path) -> None:
    """A file named by flag or variable that is not there is an error that says who named it."""
    missing = tmp_path / "none.yaml"
    with pytest.raises(ConfigError, match="named by --config"):
        find_config(missing, environ={}, home=tmp_path)
    with pytest.raises(ConfigError, match=r"named by \$OPTA_LMX_CONFIG"):
        find_config(None, environ={"OPTA_LMX_CONFIG": str(missing)}, home=tmp_path)


@pytest.mark.parametrize(
    ("written", "size"),
    [
        ("1024", 1024),
        ("1KiB", 1024),
        ("1 kib", 1024),
        ("2048B", 2048),
        ("1.5MiB", 3 * 512 * 1024),
        ("10MB", 10_000_000),
    ],
)
def test_sizes_become_whole_bytes(tmp_path: Path, written: str, size: int) -> None:
    """Binary units count in 1024, decimal ones in 1000, and the setting is an exact int."""
    parsed = load(tmp_path, f"server: {{max_body_bytes: {written}}}\n").server.max_body_bytes
    assert parsed == size
    assert type(parsed) is int


def test_keys_come_from_text_variable_and_file(tmp_path: Path) -> None:
    """A key may be written down, or be the value of a variable, or the content of a file less its line end."""
    (tmp_path / "key").write_text("from-file\n", encoding="utf-8")
    text = f"security:\n  api_keys: [plain, 'env:LMX_KEY', 'file:{tmp_path / 'key'}']\n  admin_key: env:LMX_KEY\n"
    security = load(tmp_path, text, {"LMX_KEY": "from-env"}).security
    assert [key.get_secret_value() for key in security.api_keys] == ["plain", "from-env", "from-file"]
    assert security.admin_key == SecretStr("from-env")


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        ("env:LMX_NONE", "the environment variable LMX_NONE is not set"),
        ("file:/nonexistent/key", "the file /nonexistent/key cannot be read: No such file or directory"),
        ("env:LMX_EMPTY", "should be printable ASCII characters without spaces, and not asterisks alone"),
        ("'a b'", "should be printable ASCII characters without spaces, and not asterisks alone"),
        ("'**********'", "should be printable ASCII characters without spaces, and not asterisks alone"),
        ("1234", "should be text; put it in quotes"),
    ],
)
def test_key_that_cannot_be_had_names_its_setting(tmp_path: Path, written: str, reason: str) -> None:
    """A missing variable or file, and a key no header can carry, are errors at the line of the key."""
    error = load_error(tmp_path, f"security:\n  api_keys:\n    - good\n    - {written}\n", {"LMX_EMPTY": ""})
    assert (error.line, error.key, error.reason) == (4, "security.api_keys.1", reason)


def test_keys_are_never_shown(tmp_path: Path) -> None:
    """No printed form of the settings holds a key, while the values are there for the check."""
    keys = f"api_keys: [{SECRET}], admin_key: {SECRET}, callers: {{nightly: {{key: {SECRET}-2, lane: batch}}}}"
    config = load(tmp_path, f"security: {{{keys}}}\n")
    shown = [repr(config), str(config), repr(config.security), str(config.public()), config.model_dump_json()]
    assert not [form for form in shown if SECRET in form]
    assert config.public()["security"] == {
        "api_keys": ["**********"],
        "admin_key": "**********",
        "callers": {"nightly": {"key": "**********", "weight": 1, "lane": "batch"}},
        "allow_open_lan": False,
    }


@pytest.mark.parametrize(
    "written",
    [
        f"'{SECRET} '",
        f"*{SECRET}",
        f"!{SECRET} x",
        f"!a!{SECRET} x",
        f"[{SECRET}]",
        f"{{a: {SECRET}}}",
        f"file:/nonexistent\n  unknown: {SECRET}",
        f"'{SECRET}",
        f"{SECRET}\n  admin_key: {SECRET}",
    ],
)
def test_no_error_shows_a_key(tmp_path: Path, written: str) -> None:
    """However a key is miswritten, neither the error nor anything chained to it repeats it."""
    error = load_error(tmp_path, f"security:\n  admin_key: {written}\n")
    assert SECRET not in f"{error} {error!r} {vars(error)}"
    assert error.__cause__ is None
    assert error.__suppress_context__ or error.__context__ is None


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "mac.local"])
@pytest.mark.parametrize(
    ("security", "missing"),
    [
        ("{}", "security.api_keys and security.admin_key"),
        ("{api_keys: [k]}", "security.admin_key"),
        ("{admin_key: k}", "security.api_keys"),
    ],
)
def test_open_doors_are_refused_on_the_network(tmp_path: Path, host: str, security: str, missing: str) -> None:
    """A host that other machines reach needs a key for each of the two doors."""
    error = load_error(tmp_path, f"security: {security}\nserver:\n  host: '{host}'\n")
    assert (error.line, error.key) == (3, "server.host")
    assert f"set {missing}, or" in error.reason


@pytest.mark.parametrize("security", ["{api_keys: [k], admin_key: k}", "{allow_open_lan: true}"])
def test_network_is_allowed_with_keys_or_on_purpose(tmp_path: Path, security: str) -> None:
    """Both keys, or the explicit permission, let the server listen to other machines."""
    assert load(tmp_path, f"server: {{host: 0.0.0.0}}\nsecurity: {security}\n").server.host == "0.0.0.0"


@pytest.mark.parametrize(
    ("host", "is_loopback", "url"),
    [
        ("127.0.0.1", True, "http://127.0.0.1:1234"),
        ("127.1.2.3", True, "http://127.1.2.3:1234"),
        ("localhost", True, "http://localhost:1234"),
        ("::1", True, "http://[::1]:1234"),
        ("0.0.0.0", False, "http://127.0.0.1:1234"),
        ("::", False, "http://[::1]:1234"),
        ("10.0.0.7", False, "http://10.0.0.7:1234"),
    ],
)
def test_address_of_the_server(host: str, is_loopback: bool, url: str) -> None:
    """Loopback is told from the network, and any-address hosts are reached over loopback."""
    server = ServerConfig(host=host)
    assert (server.is_loopback, server.url) == (is_loopback, url)


def test_paths_expand_the_home_directory_when_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """A setting keeps its ~ and the property beside it resolves it."""
    monkeypatch.setenv("HOME", "/home/someone")
    assert ModelsConfig().models_directory == "~/.opta-lmx/models"
    assert ModelsConfig().directory == Path("/home/someone/.opta-lmx/models")
    assert LoggingConfig(file="~/log").path == Path("/home/someone/log")
    assert LoggingConfig().path is None


def test_settings_are_frozen() -> None:
    """Nothing can write to a Config."""
    with pytest.raises(ValidationError, match="frozen"):
        Config().server.port = 1


def test_presets_and_models_have_their_own_settings(tmp_path: Path) -> None:
    """A preset carries prompt and sampling, a model its own limits; what they leave out stays unset."""
    text = (
        "models:\n"
        "  presets:\n"
        "    terse: {model: m, system_prompt: Be brief., sampling: {temperature: 0, stop: [x]}, context_length: 64}\n"
        "  per_model:\n"
        "    a/b: {kv_bits: 8, pinned: true}\n"
    )
    models = load(tmp_path, text).models
    preset = models.presets["terse"]
    assert (preset.model, preset.system_prompt, preset.context_length) == ("m", "Be brief.", 64)
    assert (preset.sampling.temperature, preset.sampling.top_p, preset.sampling.stop) == (0.0, None, ("x",))
    special = models.per_model["a/b"]
    assert (special.kv_bits, special.pinned, special.ttl_seconds) == (8, True, None)


@pytest.mark.parametrize(
    ("security", "reason"),
    [
        ("{api_keys: [k], callers: {a: {key: k}}}", "the key of 'a' is that of security.api_keys too"),
        ("{callers: {a: {key: k}, b: {key: k}}}", "the key of 'b' is that of 'a' too"),
    ],
)
def test_callers_share_no_key(tmp_path: Path, security: str, reason: str) -> None:
    """Whose request it is must be clear from its key."""
    error = load_error(tmp_path, f"security: {security}\n")
    assert (error.key, error.reason) == ("security.callers", f"{reason}; give each its own")


@pytest.mark.parametrize("name", ["api_keys[0]", "", "a b", "-a"])
def test_callers_have_names_that_fit_a_label(tmp_path: Path, name: str) -> None:
    """And none can be taken for one of the keys without a name."""
    error = load_error(tmp_path, f"security:\n  callers:\n    '{name}': {{key: k}}\n")
    assert error.key is not None
    assert error.key.startswith("security.callers")
