"""The helper is compiled when missing or stale, and only then."""

import os
from pathlib import Path

import pytest

from overland.probe.build import BuildError, CompileError, NoCompilerError, helper_path


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in that logs its calls and makes an executable file."""
    log = tmp_path / "calls"
    log.touch()
    fake = tmp_path / "fake-cc"
    # The arguments are: flags, -o, program, code.
    fake.write_text(
        f'#!/bin/sh\necho "$@" >> {log}\nwhile [ "$1" != -o ]; do shift; done\n'
        'if grep -q broken "$3"; then echo "helper.c:1: nonsense" >&2; exit 1; fi\n'
        'cp "$3" "$2" && chmod +x "$2"\n'
    )
    fake.chmod(0o755)
    monkeypatch.setenv("CC", str(fake))
    return log


def code(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "helper.c"
    path.write_text(text)
    return path


def test_it_is_compiled_once(tmp_path: Path, compiler: Path) -> None:
    cache = tmp_path / "deep" / "cache"
    path = helper_path(cache, code=code(tmp_path, "one"))
    assert os.access(path, os.X_OK)
    assert helper_path(cache, code=code(tmp_path, "one")) == path
    assert len(compiler.read_text().splitlines()) == 1
    assert "-static" in compiler.read_text()
    assert [entry.name for entry in cache.iterdir()] == [path.name]


def test_changed_code_is_compiled_again(tmp_path: Path, compiler: Path) -> None:
    first = helper_path(tmp_path / "cache", code=code(tmp_path, "one"))
    second = helper_path(tmp_path / "cache", code=code(tmp_path, "two"))
    assert first != second
    assert second.read_text() == "two"


def test_a_failing_compiler_leaves_nothing_behind(tmp_path: Path, compiler: Path) -> None:
    with pytest.raises(CompileError, match="nonsense") as caught:
        helper_path(tmp_path / "cache", code=code(tmp_path, "broken"))
    assert caught.value.output == "helper.c:1: nonsense"
    assert list((tmp_path / "cache").iterdir()) == []


def test_no_compiler_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NoCompilerError, match="install gcc"):
        helper_path(tmp_path / "cache")


def test_a_cache_that_cannot_be_made_is_a_clear_error(tmp_path: Path, compiler: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BuildError, match="cannot build the probe helper"):
        helper_path(tmp_path / "file" / "cache", code=code(tmp_path, "one"))
