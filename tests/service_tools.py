"""launchctl and systemctl as recorded: each keeps the state its real one would, and answers in its form.

The texts are those of macOS 13 to 15 and systemd 252, with the parts that nobody reads shortened.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from opta_lmx.service.commands import Outcome
from opta_lmx.service.job import Account, Job

HOME = Path("/Users/someone")
SOMEONE = Account("someone", 501, 20, HOME)

_PRINTED = """\
{target} = {{
	active count = {running:d}
	path = {home}/Library/LaunchAgents/com.opta.lmx.plist
	type = LaunchAgent
	state = {state}

	program = {home}/lmx/.venv/bin/python
	arguments = {{
		{home}/lmx/.venv/bin/python
		-m
		opta_lmx
		serve
	}}

	working directory = {home}/.opta-lmx

	stdout path = {home}/.opta-lmx/logs/server.log
	stderr path = {home}/.opta-lmx/logs/server.log
	environment = {{
		HOME => {home}
		XPC_SERVICE_NAME => com.opta.lmx
	}}

	domain = gui/501 [100005]
	asid = 100005
	minimum runtime = 10
	exit timeout = 60
	runs = {runs}
{pid}	immediate reason = speculative
	forks = 0
	execs = 1
	last exit code = {last_exit}
{signal}
	event triggers = {{
		com.apple.launchd.keepalive => {{
			state = 0
			pid = 1
		}}
	}}

	spawn type = interactive (4)
	properties = keepalive | runatload | inferred program
}}
"""


def make_job(home: Path = HOME, *, system: bool = False) -> Job:
    """Somebody's server."""
    return Job(
        owner=replace(SOMEONE, home=home),
        python=home / "lmx/.venv/bin/python",
        flags=("--port", "8080"),
        directory=home / ".opta-lmx",
        log=home / ".opta-lmx/logs/server.log",
        system=system,
        drain_seconds=29.5,
    )


@dataclass
class RecordedLaunchctl:
    """One domain with at most one service. ``asked`` are the commands so far, without their program."""

    domain: str = "gui/501"
    logged_in: bool = True
    loaded: bool = False
    running: bool = False
    disabled: bool = False
    runs: int = 0
    last_exit: str = "(never exited)"
    signal: str | None = None
    # How many times it is still there after a bootout.
    lingers: int = 0
    asked: list[str] = field(default_factory=list)

    def __call__(self, argv: Sequence[str]) -> Outcome:
        program, deed, *rest = argv
        assert program == "/bin/launchctl"
        self.asked.append(" ".join(argv[1:]))
        target = f"{self.domain}/com.opta.lmx"
        match deed, rest:
            case "print", [name] if name == self.domain:
                return Outcome(0) if self.logged_in else Outcome(113, stderr="Could not find domain for port\n")
            case "print", [name] if name == target:
                return self._print(target)
            case "enable", [name] if name == target:
                self.disabled = False
            case "bootstrap", [domain, _] if domain == self.domain:
                return self._bootstrap()
            case "bootout", [name] if name == target:
                return self._bootout()
            case "kickstart", [name] if name == target and self.loaded:
                self.running = True
                self.runs += 1
            case _:
                raise AssertionError(f"not recorded: {argv}")
        return Outcome(0)

    def _bootstrap(self) -> Outcome:
        if not self.logged_in:
            return Outcome(125, stderr="Bootstrap failed: 125: Domain does not support specified action\n")
        if self.loaded or self.disabled:
            return Outcome(5, stderr="Bootstrap failed: 5: Input/output error\nTry re-running as root.\n")
        self.loaded = self.running = True
        self.runs = 1
        return Outcome(0)

    def _bootout(self) -> Outcome:
        if not self.loaded:
            return Outcome(3, stderr="Boot-out failed: 3: No such process\n")
        self.running = False
        self.loaded = self.lingers > 0
        return Outcome(36, stderr="Boot-out failed: 36: Operation now in progress\n") if self.loaded else Outcome(0)

    def _print(self, target: str) -> Outcome:
        if self.loaded and self.lingers and not self.running:
            self.lingers -= 1
            self.loaded = self.lingers > 0
        if not self.loaded:
            text = f'Bad request.\nCould not find service "com.opta.lmx" in domain for {self.domain}\n'
            return Outcome(113, stderr=text)
        text = _PRINTED.format(
            target=target,
            home=HOME,
            running=self.running,
            state="running" if self.running else "not running",
            runs=self.runs,
            pid="\tpid = 4242\n" if self.running else "",
            last_exit=self.last_exit,
            signal=f"\tlast terminating signal = {self.signal}\n" if self.signal else "",
        )
        return Outcome(0, text)


@dataclass
class RecordedSystemctl:
    """One manager with at most one unit, whose file is ``file``; ``problem`` is why it does not answer."""

    file: Path
    problem: Outcome | None = None
    refusal: Outcome | None = None
    read: bool = False
    enabled: bool = False
    running: bool = False
    restarts: int = 0
    # ExecMainCode, ExecMainStatus and Result.
    ended: tuple[int, int, str] = (0, 0, "success")
    linger: str = "no"
    asked: list[str] = field(default_factory=list)

    def __call__(self, argv: Sequence[str]) -> Outcome:
        if argv[0] == "loginctl":
            return Outcome(0, f"Linger={self.linger}\n")
        assert argv[0] == "systemctl"
        assert argv[1] in ("--user", "--system")
        if self.problem is not None:
            return self.problem
        self.asked.append(" ".join(argv[2:]))
        match argv[2:]:
            case ["show", "--property=Version"]:
                return Outcome(0, "Version=252.38\n")
            case ["show", "opta-lmx.service", _]:
                return Outcome(0, self._show())
            case ["daemon-reload"]:
                self.read = self.file.exists()
            case [("restart" | "start") as deed, "opta-lmx.service"]:
                if self.refusal is not None:
                    return self.refusal
                assert self.read, f"{deed} of a unit that was not read"
                self.running = True
            case ["stop", "opta-lmx.service"]:
                self.running = False
            case ["enable", "opta-lmx.service"]:
                self.enabled = True
            case ["disable", "--now", "opta-lmx.service"]:
                self.enabled = self.running = False
            case _:
                raise AssertionError(f"not recorded: {argv}")
        return Outcome(0)

    def _show(self) -> str:
        code, status, result = self.ended
        fields = {
            "MainPID": 4242 if self.running else 0,
            "Result": result,
            "NRestarts": self.restarts,
            "ExecMainCode": code,
            "ExecMainStatus": status,
            "LoadState": "loaded" if self.read else "not-found",
            "ActiveState": "active" if self.running else "inactive",
            "SubState": "running" if self.running else "dead",
        }
        return "".join(f"{name}={value}\n" for name, value in fields.items())
