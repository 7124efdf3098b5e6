"""Random configuration files: resolved configurations with hostile values and keys, YAML's traps, and damaged bytes."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from slime_spec.config.build import to_yaml
from slime_spec.config.schema import settings
from slime_spec.config.tree import Config

# Values as YAML writes them: several are something else than they look like.
SCALARS = (
    *(
        "0",
        "1",
        "-1",
        "1.0",
        "1e-6",
        "1e39",
        "1e400",
        ".inf",
        "-.inf",
        ".nan",
        "010",
        "0o17",
        "0x1F",
        "1_000",
        "9" * 400,
    ),
    *("on", "off", "yes", "no", "y", "~", "null", "", "''", '"null"', "true", "2024-01-31", "2024-01-31 10:00:00"),
    *("12:30:45", "190:20:30", "!!binary aGVsbG8=", "!!set {a, b}", "!!python/object/apply:os.getcwd []", "!!float x"),
    *("!!int abc", "!!timestamp x", "!!omap [a: 1]", "!unknown 3", "*nowhere", "&a 1", "[]", "[1, [2, [3]]]", "{}"),
    *("{a: {b: 1}}", "{1: 2}", "{[1]: 2}", "{null: 1}", "? x", "- 1", "|", ">\n  text", '"\\ud800"', '"\\0"', '"\\x"'),
    *("${model.hf_checkpoint}", "${", "@x", "`x`", "%x", "<<: 1", "'unclosed", "[unclosed", "=", "!!null x", "日本語"),
)
LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{f'*a{n - 1}, ' * 9}*a{n - 1}]\n" for n in range(1, 30))
DOCUMENTS = (
    *(b"", b" ", b"\n", b"\t", b"---", b"...", b"--- 1\n--- 2", b"null", b"3", b"[1]", b"a", b"%YAML 9.9\n---\n{}"),
    *(b"\x00", b"\xff\xfe\x00", b"\xef\xbb\xbfrun: {}", bytes(range(256)), b"{" * 3000, b"[" * 3000, b"- " * 3000),
    *(b"a:\n" + b"".join(b" " * n + b"b:\n" for n in range(1, 400)), b"run: &r\n  seed: *r\n", b"&r run: *r"),
    *(b"run: &r {<<: *r}", b"<<: {run: {seed: 1}}", b"run: {<<: [1, 2]}", b"? {a: 1}\n: 2", b"? [run]\n: {}", b"1: {}"),
    *(b"run: {1: 2}", b"run: {? [a] : 2}", b"null: {}", b"run: {null: 1}", b"run: 1", b"run: []", b"2024-01-31: {}"),
    *(LAUGHS.encode(), b"run: {seed: 1}\nrun: {seed: 2}", b"run: {seed: 1, seed: 2}", b"model: !!set {hf_checkpoint}"),
    *(b"? !!binary aGk=\n: 1", b"sglang: {page_size: " + b"[" * 900 + b"]" * 900 + b"}", b"a: &x {b: *x}", b"=: {}"),
)


def yaml_text(random: Random) -> bytes:
    """Return the bytes of a file that --config might name."""
    return random.choice((_hostile_values, _hostile_values, _mutated, _cut, _document))(random)


def _document(random: Random) -> bytes:
    return random.choice(DOCUMENTS)


def _hostile_values(random: Random) -> bytes:
    """Write a few settings, each with a value that YAML or the setting may not like."""
    nodes: dict[str, list[str]] = {}
    for path in random.sample(list(settings()), random.choice((1, 1, 2, 4))):
        node, _, leaf = path.partition(".")
        nodes.setdefault(node, []).append(f"  {leaf}: {random.choice(SCALARS)}")
    if random.random() < 0.2:
        nodes.setdefault("sglang", []).append(f"  page_size: {random.choice(SCALARS)}")
    return "".join(f"{node}:\n" + "\n".join(lines) + "\n" for node, lines in nodes.items()).encode()


def _mutated(random: Random) -> bytes:
    """Change some bytes of a whole configuration file."""
    text = bytearray(to_yaml(Config()).encode())
    changes: tuple[Callable[[int], object], ...] = (
        lambda at: text.__setitem__(at, random.randrange(256)),
        lambda at: text.__delitem__(at),
        lambda at: text.insert(at, random.choice(b"\t :{}[]&*!|>'\"%@`#-\n\x00\xff")),
        lambda at: text.__setitem__(slice(at, at), text[at : at + 60]),
    )
    for _ in range(random.choice((1, 2, 5))):
        random.choice(changes)(random.randrange(len(text)))
    return bytes(text)


def _cut(random: Random) -> bytes:
    """Cut a whole configuration file off."""
    text = to_yaml(Config()).encode()
    return text[: random.randrange(len(text))]
