"""Files of somebody else's are data, and none is too much."""

import os

import pytest

from seqzoo.records import LARGEST, is_name, read_json, read_text, read_yaml


@pytest.fixture
def path(tmp_path):
    return tmp_path / "file"


@pytest.mark.parametrize(
    "content", ["", "{", "[" * 100_000, '{"a":' * 100_000, "1" * 10_000, " " * LARGEST + "1", b"\xff"]
)
def test_json_that_is_refused(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError):
        read_json(path)


def test_json_that_is_read(path):
    path.write_text('{"a": [1, 2.5, null, "é"]}', encoding="utf-8")
    assert read_json(path) == {"a": [1, 2.5, None, "é"]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: ${b}", r"line 1: \$\{b\} would be computed"),
        ("a: x\n${b}: c", "line 2: "),
        ("a:\n  - 'x${oc.env:HOME}y'", "would be computed"),
        ('"\\u0024{oc.env:HOME}": a', "would be computed"),
        ("a: !!python/object/apply:os.getcwd []", "python/object/apply:os.getcwd would be made into something else"),
        ("a: !secret x", "!secret would be made"),
        ("- &a [x, x]\n- &b [*a, *a]", r"line 2: \*a stands for what is written elsewhere"),
        ("a: &a {b: c}\nd:\n  <<: *a", "stands for"),
        ("[" * 17, "nested too deeply"),
        ("a: " + "{b: " * 17, "nested too deeply"),
        ("a: [", "it is no YAML"),
        ("3", "it holds int in place of keys and values"),
        ("- a", "it holds list in place"),
        ("", "it holds NoneType in place"),
        ("a: b: c", "it is no YAML"),
        ("a: 1\na: 2", "it is no YAML"),
        ("a: \x00", "it is no YAML"),
        ("a: " + "x" * (1 << 17), "larger than 131,072 bytes"),
    ],
)
def test_yaml_that_is_refused(path, content, message):
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_yaml(path)


def test_yaml_that_is_read(path):
    path.write_text("a: [1, 1e-3, null, true]\nb: {c: é, d: '1', e: $x}\n# ${comment}\n", encoding="utf-8")
    assert read_yaml(path) == {"a": [1, 0.001, None, True], "b": {"c": "é", "d": "1", "e": "$x"}}


@pytest.mark.parametrize("read", [read_json, read_yaml, read_text])
def test_a_pipe_is_not_waited_for(path, read):
    os.mkfifo(path)
    with pytest.raises(ValueError, match="no regular file"):
        read(path)


def test_names():
    assert all(map(is_name, ["run", "a.b", "..run", "é ü"]))
    assert not any(map(is_name, ["", ".", "..", "a/b", "/", "../a", "a\\b", "a\0", None, 1]))
