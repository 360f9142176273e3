"""Compiles the helper once and keeps it until its code changes."""

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

HELPER = Path(__file__).with_name("helper.c")
# Static, because a guest that boots into a bare initramfs has no C library to load.
FLAGS = ("-O2", "-static")
COMPILERS = ("cc", "gcc", "clang")


class BuildError(Exception):
    """The helper could not be built; the message is fit for the user."""


class NoCompilerError(BuildError):
    """No C compiler is installed."""


class CompileError(BuildError):
    """The compiler ran and failed; `output` is what it wrote."""

    def __init__(self, message: str, output: str) -> None:
        super().__init__(message)
        self.output = output


def default_cache() -> Path:
    """Where the helper is kept unless told otherwise, after the XDG convention."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "overland"


def find_compiler() -> str:
    """The path of a C compiler: $CC if set, else the first of cc, gcc and clang."""
    chosen = os.environ.get("CC")
    for name in (chosen,) if chosen else COMPILERS:
        found = shutil.which(name)
        if found:
            return found
    looked = chosen or ", ".join(COMPILERS)
    raise NoCompilerError(
        f"the probe helper needs a C compiler and there is none (looked for {looked}); "
        "install gcc with the static C library (Debian: gcc libc6-dev)"
    )


def helper_path(cache: Path | None = None, *, code: Path = HELPER) -> Path:
    """The path of the compiled helper under `cache`, compiled now if missing or out of date.

    The name holds a hash of code and flags, so changed code never meets an old program.
    """
    directory = cache if cache is not None else default_cache()
    try:
        text = code.read_bytes()
        digest = hashlib.sha256(b"\0".join([text, *map(str.encode, FLAGS)])).hexdigest()[:16]
        target = directory / f"overland-probe-{digest}"
        if os.access(target, os.X_OK):
            return target
        compiler = find_compiler()
        directory.mkdir(parents=True, exist_ok=True)
        # Built aside and renamed: another process never sees half a program.
        with tempfile.TemporaryDirectory(dir=directory, prefix=".build-") as scratch:
            _compile(compiler, code, Path(scratch) / "overland-probe", target)
    except OSError as error:
        raise BuildError(f"cannot build the probe helper: {error}") from error
    return target


def _compile(compiler: str, code: Path, built: Path, target: Path) -> None:
    command = [compiler, *FLAGS, "-o", str(built), str(code)]
    result = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if result.returncode:
        output = result.stderr.strip()
        last = output.splitlines()[-1] if output else f"exit status {result.returncode}"
        raise CompileError(f"{compiler} could not build the probe helper: {last}", output)
    built.replace(target)
