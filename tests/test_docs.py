"""README and docs: links lead somewhere, commands can be run, quoted messages are in the code."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import io
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from detectron2.config import CfgNode, get_cfg
from markdown_it import MarkdownIt
from markdown_it.token import Token

from nl_detectron import add_nonlocal_config
from nl_detectron.config import walk

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
FOLDERS = "configs|demo|docs|lab|tests|tools"
DETECTRON2S = {"tools/lazyconfig_train_net.py"}

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@cache
def tokens(page: Path) -> list[Token]:
    """All of a page, what is within paragraphs and cells included."""
    blocks = MarkdownIt().enable("table").parse(page.read_text(encoding="utf-8"))
    return [token for block in blocks for token in (block, *(block.children or ()))]


@cache
def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    parts = zip(tokens(page), tokens(page)[1:])
    titles = [text.content for opening, text in parts if opening.type == "heading_open"]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pages
def test_links(page: Path) -> None:
    attributes = [token.attrs.get("href") or token.attrs.get("src") for token in tokens(page)]
    for link in filter(None, map(str, filter(None, attributes))):
        if "://" in link:
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), f"{page.name} links to {link}"
        if anchor:
            assert anchor in anchors(target), f"{page.name} links to {link}"


def code(page: Path) -> Iterator[str]:
    for token in tokens(page):
        if token.type in ("fence", "code_inline"):
            yield re.sub(r"\\\n\s*", "", token.content)


def commands(page: Path) -> Iterator[list[str]]:
    """The words of each line of code that runs `make` or something in Python."""
    for line in "\n".join(code(page)).splitlines():
        line = re.sub(r"^(\$ |!)", "", line.strip())
        if re.match(rf"([A-Z_0-9]+=\S* +)*(make |python |torchrun |train_net|({FOLDERS})/)", line):
            words = shlex.split(line, comments=True)
            yield [word for word in words if not re.match("[A-Z_0-9]+=", word)]


@cache
def options(name: str, is_module: bool) -> set[str]:
    """Those that the help of a script or module names."""
    help_text = io.StringIO()
    argv, sys.argv = sys.argv, [name, "--help"]
    try:
        with contextlib.redirect_stdout(help_text), pytest.raises(SystemExit):
            (runpy.run_module if is_module else runpy.run_path)(name, run_name="__main__")
    finally:
        sys.argv = argv
    return set(re.findall(r"--[a-z][\w-]*", help_text.getvalue()))


@pages
def test_commands(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for words in commands(page):
        line = " ".join(words)
        for word in words:
            is_ours = re.fullmatch(rf"({FOLDERS})/[\w/-]+\.(py|yaml)", word)
            assert not is_ours or word in DETECTRON2S or Path(word).exists(), line
        if words[0] == "make":
            assert {word for word in words[1:] if word.isalpha()} <= targets, line
            continue
        if words[1:2] == ["-m"]:
            name, arguments = words[2], words[3:]
            assert importlib.util.find_spec(name), line
            if name == "nl_detectron.run":  # what follows the script is that script's
                scripts = [i for i, word in enumerate(arguments) if word.endswith(".py")]
                arguments = arguments[: scripts[0]] if scripts else arguments
        else:
            scripts = [i for i, word in enumerate(words) if word.endswith(".py")]
            if not scripts or words[scripts[0]] in DETECTRON2S:
                continue
            name, arguments = words[scripts[0]], words[scripts[0] + 1 :]
            assert Path(name).exists(), line
        used = {word.partition("=")[0] for word in arguments if re.match("--[a-z]", word)}
        if used and name not in ("pip", "pytest", "torch.distributed.run"):
            assert used <= options(name, words[1:2] == ["-m"]), line


@pages
def test_config_keys(page: Path) -> None:
    cfg = get_cfg()
    add_nonlocal_config(cfg)
    for key in re.findall(r"\b(?:[A-Z_0-9]+\.)+[A-Z_0-9]+\b", "\n".join(code(page))):
        if key.partition(".")[0] in cfg:
            node = cfg
            for part in key.split("."):
                assert isinstance(node, CfgNode), key
                assert part in node, f"{page.name}: {key}"
                node = node[part]


def test_page_of_the_config(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")  # which conf.py sets, too
    page = runpy.run_path(str(ROOT / "docs" / "conf.py"))["config_page"]()
    assert (ROOT / "docs" / "CONFIG.md").read_text(encoding="utf-8") == page, "run `make docs`"
    cfg = get_cfg()
    add_nonlocal_config(cfg)
    ours = {key for key, value in walk(cfg) if not isinstance(value, CfgNode)}
    assert ours - {key for key, _ in walk(get_cfg())} == set(re.findall(r"`([A-Z_.]+)`", page))


def messages() -> list[str]:
    """All strings in the code, with … in the place of values."""
    found = []
    files = [
        f for folder in ("lab", "nl_detectron", "tools") for f in (ROOT / folder).rglob("*.py")
    ]
    for file in [ROOT / "train_net.py", *files]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (v.value if isinstance(v, ast.Constant) else "…" for v in node.values)
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_quoted_messages() -> None:
    page = ROOT / "docs" / "TROUBLESHOOTING.md"
    ours, others = page.read_text(encoding="utf-8").split("\n### Texts of Detectron2 and PyTorch\n")
    quoted = re.findall(r"^\| `(.+?)` \|", ours, re.MULTILINE)
    assert len(quoted) > 30
    in_code = messages()
    for message in quoted:
        for part in filter(None, (part.strip() for part in message.split("…"))):
            assert any(part in text for text in in_code), f"{part!r} of {message!r}"
    assert "frozen, as its stage is; it will not learn" in others
    assert any("frozen, as its stage is; it will not learn" in text for text in in_code)
