"""Run one case in a forked child within bounds of time, memory and places, and judge what it did.

A case has a folder of its own: `work` (where it runs, a copy of the base), `cache`, `tmp`, `said`. A process that has
imported everything forks a child for each case, so that a crash, a loop or an allocation ends the child alone.
"""

import contextlib
import hashlib
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SECONDS, GIGABYTE = 10, 2**30
IDLE = 5  # seconds without any computing after which a case is taken to hang
ROOM = 6 * GIGABYTE  # address space beyond the parent's: what is only reserved costs nothing, but has an end
PROCESSES = 4  # that a case may start
LONGEST = 1000  # characters of a sentence
OUTSIDE, TOO_MANY = 97, 98
STEPS = re.compile(r"step \d+/\d+")  # what a training says: one of many steps may take as long as it was asked for
KINDS = ("good 0", "good 2", "status 1", "sentence", "traceback", "written", "outside", "slow", "memory", "crash")


@dataclass(frozen=True)
class Verdict:
    """What became of a case: one of KINDS, with the evidence."""

    kind: str
    evidence: str
    seconds: float
    megabytes: float

    @property
    def good(self) -> bool:
        return self.kind.startswith("good")


def run(case: Callable[[Path], list[str]], base: Path, place: Path) -> Verdict:
    """Run one case and judge it.

    Args:
        case: changes the files in the working folder (a copy of the base) and returns the arguments of `espalier`.
        base: folder with `work` and `cache`.
        place: the case's own folder, always the same one, as some files hold the paths of their neighbours.
    """
    shutil.rmtree(place, ignore_errors=True)
    for name in ("work", "cache"):
        shutil.copytree(base / name, place / name, symlinks=True)
    (place / "tmp").mkdir()
    child = os.fork()
    if child == 0:
        _child(case, place)
    status, used = _wait(child)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # whatever it has started
    said = (place / "said").read_bytes().decode("utf-8", "replace") if (place / "said").exists() else ""
    seconds = used.ru_utime + used.ru_stime
    megabytes = used.ru_maxrss / 1024
    kind, evidence = _judge(status, said, place, megabytes)
    if kind.startswith("good") and seconds > SECONDS and not STEPS.search(said):
        kind, evidence = "slow", f"{seconds:.1f} s"
    return Verdict(kind, evidence, seconds, megabytes)


def _judge(status: int, said: str, place: Path, megabytes: float) -> tuple[str, str]:
    lines = [line for line in said.splitlines() if line.strip()]
    last = lines[-1] if lines else ""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number == signal.SIGXCPU and STEPS.match(last):
            return "good 0", last[:200]
        if number in (signal.SIGXCPU, signal.SIGKILL):
            return "slow", f"stopped after {SECONDS} s: {last[:200]}"
        return "crash", f"{signal.Signals(number).name}: {last[:200]}"
    code = os.WEXITSTATUS(status)
    if code == OUTSIDE:
        return "outside", last
    if code == TOO_MANY:
        return "slow", f"started more than {PROCESSES} processes"
    if megabytes > 1024 or re.search(r"out of memory|can't allocate|MemoryError|std::bad_alloc", last):
        return "memory", f"{megabytes:.0f} MB: {last[:300]}"
    if "Traceback (most recent call last)" in said or "panicked at" in said:
        return "traceback", next(line for line in reversed(lines) if "Traceback" not in line)[:400]
    if code == 0:
        return "good 0", last[:200]
    if code == 1 and re.match(r"espalier: error: (the loss|the norm of the gradient|.*is not finite)", last):
        return "good 0", last[:200]  # a training that diverges is told so: no fault of the input or of ours
    if code != 2:
        return "status 1", f"status {code}: {last[:400]}"
    ours = [line for line in lines if line.startswith("espalier: error: ")]
    if len(ours) != 1 or ours[0] != last:
        return "sentence", f"{len(ours)} sentences, the last line is: {last[:300]}"
    if len(last) > LONGEST or re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202e]", last):
        return "sentence", f"{len(last)} characters, or some that no terminal should get: {last[:300]!a}"
    if re.search(r"<class '|typing\.|Not of type|Union\[|Does not validate|object at 0x", last):
        return "sentence", f"shows types of Python: {last[:400]}"
    if changed := _changes(place):
        return "written", f"{', '.join(changed)[:300]} | {last[:300]}"
    return "good 2", last[:400]


def listing(folder: Path) -> dict[str, str]:
    """Relative path -> what is there: link, folder, or the hash of a file."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            found[name] = f"link to {path.readlink()}"
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[name] = "folder" if path.is_dir() else "device"
    return found


def _changes(place: Path) -> list[str]:
    """What differs from the listing before, and what is left in the temporary folder."""
    before = {}
    for line in (place / "before").read_text().splitlines():
        name, _, what = line.rpartition("\t")
        before[name] = what
    after = listing(place / "work")
    changed = [f"+{name}" for name in after if name not in before] + [
        f"-{name}" for name in before if name not in after
    ]
    changed += [f"~{name}" for name in after if name in before and before[name] != after[name]]
    return changed + [f"+tmp/{name}" for name in listing(place / "tmp")]


def _child(case: Callable[[Path], list[str]], place: Path) -> None:
    """Prepare, run and end the child; never returns."""
    code = 70
    try:
        os.setsid()
        _bound(place)
        os.chdir(place / "work")
        argv = case(Path())
        rows = [f"{name}\t{what}" for name, what in listing(Path()).items()]
        (place / "before").write_text("\n".join(rows))
        said = os.open(place / "said", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        nothing = os.open(os.devnull, os.O_RDWR)
        for descriptor, stands_for in ((nothing, 0), (nothing, 1), (said, 2)):
            os.dup2(descriptor, stands_for)
        _confine(place)
        from recipes import cli

        code = cli.main(argv)
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _bound(place: Path) -> None:
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + ROOM, size + ROOM))
    spent = time.process_time()
    resource.setrlimit(resource.RLIMIT_CPU, (int(spent) + SECONDS + 1, int(spent) + SECONDS + 2))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.environ["ESPALIER_CACHE"] = str(place / "cache")
    os.environ["TMPDIR"] = str(place / "tmp")
    tempfile.tempdir = None
    # what Lightning starts for further ranks must not be this program again
    sys.argv, sys.dont_write_bytecode = [os.devnull], True
    sys.modules["__main__"].__spec__ = None


def _confine(place: Path) -> None:
    """End the child where it writes outside of its folder, talks to the network, or starts process after process."""
    inside = (str(place.resolve()) + "/", "/dev/", "/proc/")
    started = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal started
        if event == "subprocess.Popen" and os.devnull in arguments[1]:
            os._exit(0)  # accepted: Lightning starts the process of a further rank, which would wait for this one
        if event in ("subprocess.Popen", "os.fork", "os.posix_spawn"):
            started += 1
            if started > PROCESSES:
                os._exit(TOO_MANY)
        elif event in ("os.system", "os.exec"):
            _leave(f"{event} {arguments[0]!r}")
        elif event == "socket.connect" and isinstance(arguments[1], tuple):
            _leave(f"connects to {arguments[1]}")
        elif event == "open" and isinstance(arguments[0], str | bytes) and _writes(arguments[1], arguments[2]):
            path = os.path.realpath(os.fsdecode(arguments[0]))
            if not path.startswith(inside):
                _leave(f"writes {path}")
        elif event in ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.symlink", "shutil.rmtree"):
            given = arguments[1] if event == "os.symlink" else arguments[0]
            path = os.path.abspath(os.fsdecode(given)) if isinstance(given, str | bytes) else None
            known = event == "os.mkdir" and path and os.path.isdir(path)
            if path and not known and not path.startswith(inside):
                _leave(f"{event} {path}")

    sys.addaudithook(hook)


def _writes(mode: Any, flags: Any) -> bool:
    if isinstance(mode, str):
        return any(letter in mode for letter in "wax+")
    return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


def _leave(what: str) -> None:
    os.write(2, f"\n{what}\n".encode())
    os._exit(OUTSIDE)


def _wait(child: int) -> tuple[int, resource.struct_rusage]:
    """Wait for the child's end; one that neither computes nor ends is killed."""
    spent, since, pause = -1.0, time.monotonic(), 0.002
    while True:
        ended, status, used = os.wait4(child, os.WNOHANG)
        if ended:
            return status, used
        now = time.monotonic()
        if (computed := _computed(child)) != spent:
            spent, since = computed, now
        elif now - since > IDLE:
            os.killpg(child, signal.SIGKILL)
        time.sleep(pause)
        pause = min(0.05, pause * 1.3)


def _computed(process: int) -> float:
    """Seconds of computing of a process and its ended children, waiting for a core included."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    if fields[0] == "R":  # it would compute, if there were a core for it
        return time.monotonic()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
