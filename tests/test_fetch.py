"""Model files by address: the cache comes first, and every failure says how to mend it."""

import hashlib
import subprocess
import zipfile
from pathlib import Path

import huggingface_hub
import pytest

from flaxdraft.errors import InputError
from flaxdraft.files.fetch import cache_dir, content_of, fetch, sha256_of

ADDRESS = "wheel:some-model==1.2/some_model/weights.gguf"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FLAXDRAFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def pip(monkeypatch):
    """pip(returncode, stderr, files) puts a stand-in for `pip download` in place and returns the list of its calls."""

    def install(returncode=0, stderr="", files=None):
        calls = []

        def run(command, **kwargs):
            calls.append(command)
            folder = command[command.index("--dest") + 1]
            if files is not None:
                with zipfile.ZipFile(f"{folder}/some_model-1.2-py3-none-any.whl", "w") as archive:
                    for name, content in files.items():
                        archive.writestr(name, content)
            return subprocess.CompletedProcess(command, returncode, "", stderr)

        monkeypatch.setattr(subprocess, "run", run)
        return calls

    return install


def test_a_path_is_taken_as_it_is(tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(b"abc")
    assert fetch(str(path), None) == path
    assert fetch(str(path), hashlib.sha256(b"abc").hexdigest()) == path
    assert sha256_of(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.gguf").write_bytes(b"abc")
    assert fetch("~/a.gguf", None) == tmp_path / "a.gguf"


def test_a_different_sha256_is_refused_with_both_values(tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(b"abc")
    with pytest.raises(InputError, match=r"a.gguf: sha256 is ba7816bf.*target.sha256 says 00.*check the file, or cor"):
        fetch(str(path), "00")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=rf"target.path: no file or directory {tmp_path / 'none.gguf'}$"):
        fetch(str(tmp_path / "none.gguf"), None)


def test_a_directory_is_itself_and_has_no_sha256(tmp_path):
    assert fetch(str(tmp_path), None) == tmp_path
    with pytest.raises(InputError, match=r"target.sha256: .* is a directory; only a single file"):
        fetch(str(tmp_path), "00")


def test_a_directory_is_told_by_its_files(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"x" * 100)
    first = content_of(str(tmp_path), None)
    (tmp_path / "notes.txt").write_text("not the model's")
    assert content_of(str(tmp_path), None) == first
    (tmp_path / "model.safetensors").write_bytes(b"x" * 99 + b"y")
    second = content_of(str(tmp_path), None)
    (tmp_path / "config.json").write_text("{ }")
    assert len({first, second, content_of(str(tmp_path), None)}) == 3


def test_a_name_on_the_hub(tmp_path, monkeypatch):
    asked = []

    def download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert fetch("org/some-model", None) == tmp_path
    assert asked[0][0] == "org/some-model"
    assert "*.safetensors" in asked[0][1]


def test_a_hub_that_cannot_be_reached(monkeypatch):
    def refuse(name, allow_patterns):
        raise ConnectionError("no route to the hub\nand a long trace")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(InputError, match=r"no directory org/model, and the hub could not .*\(no route to the hub\)"):
        fetch("org/model", None)


@pytest.mark.parametrize(
    "address", ["wheel:", "wheel:name", "wheel:name==1.0", "wheel:name==1.0/", "wheel:name/file", "wheel:na me==1/f"]
)
def test_a_malformed_wheel_address_is_refused_without_pip(address, cache, pip):
    calls = pip()
    with pytest.raises(InputError, match=r"target.path: found 'wheel:.*', expected wheel:NAME==VERSION/FILE"):
        fetch(address, None)
    assert not calls


def test_a_cached_file_needs_no_pip(cache, pip):
    calls = pip()
    kept = cache / "some-model-1.2" / "some_model" / "weights.gguf"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"kept")
    assert fetch(ADDRESS, hashlib.sha256(b"kept").hexdigest()) == kept
    with pytest.raises(InputError, match=f"remove {kept} and run again"):
        fetch(ADDRESS, "00")
    assert not calls


def test_a_wheel_is_downloaded_once_and_only_the_file_is_kept(cache, pip):
    calls = pip(files={"some_model/weights.gguf": b"new", "some_model/__init__.py": b"raise SystemExit"})
    path = fetch(ADDRESS, hashlib.sha256(b"new").hexdigest())
    assert path.read_bytes() == b"new"
    assert fetch(ADDRESS, None) == path
    assert len(calls) == 1
    assert {"download", "--no-deps", "--only-binary=:all:", "some-model==1.2"} <= set(calls[0])
    assert [file for file in cache.rglob("*") if file.is_file()] == [path]


def test_a_wheel_without_the_file_is_named(cache, pip):
    pip(files={"some_model/other.gguf": b""})
    with pytest.raises(InputError, match=r"some_model-1.2-py3-none-any.whl holds no some_model/weights.gguf"):
        fetch(ADDRESS, None)
    assert not [file for file in cache.rglob("*") if file.is_file()]


@pytest.mark.parametrize(
    ("returncode", "stderr", "files", "tail"),
    [
        (1, "WARNING: retrying\nERROR: No matching distribution\n", None, "ERROR: No matching distribution"),
        (1, "", None, "pip wrote no message"),
        (0, "", None, "pip wrote no message"),
        (1, "ERROR: cut off", {"some_model/weights.gguf": b"half"}, "ERROR: cut off"),
    ],
)
def test_a_failed_download_gives_pips_last_line_and_the_cache_path(cache, pip, returncode, stderr, files, tail):
    pip(returncode, stderr, files)
    kept = cache / "some-model-1.2" / "some_model" / "weights.gguf"
    with pytest.raises(InputError) as caught:
        fetch(ADDRESS, None)
    assert str(caught.value) == (
        f"target.path: some-model==1.2 is not in the cache ({kept.parent}) and pip could not download it: {tail}. "
        f"Connect to a package index, or put the file at {kept}"
    )
    assert not kept.exists()


def test_the_real_pip_without_an_index_is_one_message(cache, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(InputError, match=rf"is not in the cache \({cache}/.*put the file at {cache}/"):
        fetch("wheel:flaxdraft-no-such-model==0.0.1/file.gguf", None)


def test_the_cache_follows_the_environment(monkeypatch):
    monkeypatch.setenv("FLAXDRAFT_CACHE", "/a/b")
    monkeypatch.setenv("XDG_CACHE_HOME", "/c")
    assert cache_dir() == Path("/a/b")
    monkeypatch.delenv("FLAXDRAFT_CACHE")
    assert cache_dir() == Path("/c/flaxdraft")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/d")
    assert cache_dir() == Path("/d/.cache/flaxdraft")


def test_an_empty_cache_variable_means_the_default(monkeypatch, tmp_path):
    monkeypatch.setenv("FLAXDRAFT_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "flaxdraft"


def test_a_digest_in_capitals_is_the_same_digest(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    assert fetch(str(path), sha256_of(path).upper()) == path


def test_a_cache_that_cannot_be_written_is_named(monkeypatch):
    monkeypatch.setenv("FLAXDRAFT_CACHE", "/proc/nowhere")
    with pytest.raises(InputError, match=r"a==1 cannot be kept in the cache \(/proc/nowhere/a-1: .*FLAXDRAFT_CACHE"):
        fetch("wheel:a==1/model.gguf", None)
