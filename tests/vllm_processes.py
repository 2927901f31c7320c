"""Real vLLM for tests, from the environment .venv-vllm: engines in one process, and servers that speak HTTP."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from mounting import DEADLINE, ROOT, adopt_orphans, wait_for

ENVIRONMENT: Final = ROOT / ".venv-vllm"
READY: Final = 300.0
"""Seconds within which a server must answer; on a busy machine it takes one of them."""

OPTIONS: Final[Mapping[str, Any]] = {
    "enforce_eager": True,
    "dtype": "bfloat16",
    "max_model_len": 512,
    "max_num_seqs": 2,
    "disable_log_stats": True,
}


@dataclass(frozen=True, slots=True)
class Generated:
    """What followed a prompt: the tokens, and the log probability of each, which tells models apart sooner."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]


Answer = tuple[Generated, ...]
"""What followed each of several prompts."""


def program(name: str) -> Path:
    """Return a program of the environment."""
    path = ENVIRONMENT / "bin" / name
    assert (ENVIRONMENT / ".mergefs").exists(), f"vLLM is not installed in {ENVIRONMENT}: run scripts/test.sh --all"
    return path


def variables(scratch: Path) -> dict[str, str]:
    """Return an environment for vLLM: its files below ``scratch``, little memory, and one thread, as all have here."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return kept | {
        "HF_HOME": str(scratch / "huggingface"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TMPDIR": str(scratch),
        "VLLM_CACHE_ROOT": str(scratch / "vllm"),
        "VLLM_CONFIG_ROOT": str(scratch / "vllm"),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
    }


@dataclass(frozen=True, slots=True)
class Engine:
    """An engine that ``vllm_engines.py`` loads."""

    name: str
    directory: Path
    options: Mapping[str, Any] = field(default_factory=dict)
    reloads: Sequence[Path] = ()
    dies: bool = False


def run_engines(
    engines: Sequence[Engine], prompts: Sequence[str], tokens: int, scratch: Path
) -> tuple[subprocess.CompletedProcess[str], dict[str, list[Answer]]]:
    """Load engines in one process; return how it ended, and for each what it generated at first and after reloads."""
    question, answer = scratch / "question.json", scratch / "answer.json"
    asked = {
        "prompts": list(prompts),
        "tokens": tokens,
        "options": dict(OPTIONS),
        "engines": [
            {
                "name": engine.name,
                "directory": str(engine.directory),
                "options": dict(engine.options),
                "reloads": [str(path) for path in engine.reloads],
                "dies": engine.dies,
            }
            for engine in engines
        ],
    }
    question.write_text(json.dumps(asked))
    answer.unlink(missing_ok=True)
    done = subprocess.run(
        [program("python"), "-P", ROOT / "tests" / "vllm_engines.py", question, answer],
        env=variables(scratch) | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    if not answer.exists():
        return done, {}
    told = json.loads(answer.read_text())
    return done, {name: [answer_of(one) for one in answers] for name, answers in told.items()}


def answer_of(told: Sequence[Mapping[str, Any]]) -> Answer:
    return tuple(Generated(tuple(one["tokens"]), tuple(one["logprobs"])) for one in told)


# -- servers -----------------------------------------------------------------------------------------------------------


class Server:
    """``vllm serve`` in a session of its own."""

    def __init__(self, words: Sequence[str], name: str, scratch: Path, extra: Mapping[str, str]) -> None:
        adopt_orphans()
        self.ended = False
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log_file = scratch / f"{name}.log"
        with self.log_file.open("wb") as log:
            self.process = subprocess.Popen(
                [program("vllm"), *words, "--port", str(self.port), *switches(OPTIONS)],
                env=variables(scratch) | extra,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def log(self) -> str:
        """Return the end of what the server has printed, and where all of it is."""
        return f"{self.log_file}:\n{self.log_file.read_text(errors='replace')[-8000:]}"

    def wait_until_ready(self) -> None:
        def answers() -> bool:
            assert self.process.poll() is None, f"the server ended:\n{self.log()}"
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=10) as response:
                return bool(response.status == 200)
            return False

        try:
            wait_for(answers, "the server", READY, pause=0.1)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log()}") from error

    def complete(self, prompts: Sequence[str], tokens: int) -> Answer:
        """Ask for what follows each prompt, as any client does, one after the other."""
        return tuple(self._complete(prompt, tokens) for prompt in prompts)

    def _complete(self, prompt: str, tokens: int) -> Generated:
        asked = {
            "model": "merged",
            "prompt": prompt,
            "max_tokens": tokens,
            "temperature": 0,
            "logprobs": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        request = urllib.request.Request(
            f"{self.url}/v1/completions", json.dumps(asked).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=READY) as response:
                (choice,) = json.load(response)["choices"]
        except OSError as error:
            raise AssertionError(f"{error}\n{self.log()}") from error
        return Generated(tuple(choice["token_ids"]), tuple(choice["logprobs"]["token_logprobs"]))

    def stop(self, number: int = signal.SIGTERM) -> None:
        """Send the server a signal, or all its processes SIGKILL, and see that none of them is left."""
        if self.ended:
            return
        if number != signal.SIGKILL:
            self.process.send_signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(DEADLINE)
        for pid in self._processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        with contextlib.suppress(ChildProcessError):
            while True:
                os.waitpid(-self.process.pid, 0)  # its children, which are now this process's
        self.ended = True

    def _processes(self) -> list[int]:
        """Return the processes of the server's session, but for those of Python's that clean up after the others."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                ours = os.getsid(int(path.name)) == self.process.pid
                if ours and b"resource_tracker" not in (path / "cmdline").read_bytes():
                    found.append(int(path.name))
        return found


def switches(options: Mapping[str, Any]) -> list[str]:
    """Return options of ``vllm.LLM`` as the command line has them."""
    words = []
    for name, value in options.items():
        word = "--" + name.replace("_", "-")
        words += [word] if value is True else [word, str(value)]
    return words


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


@contextlib.contextmanager
def serving(*servers: Server) -> Iterator[None]:
    """Wait until servers, which start side by side, answer; end them when the test has."""
    try:
        for server in servers:
            server.wait_until_ready()
        yield
    finally:
        for server in servers:
            server.stop()
