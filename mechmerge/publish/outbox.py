"""What leaves the machine, file by file: nothing goes that is not named here.

Weights, recipe, masks and measurements as safetensors and YAML, records as JSON, the card as Markdown, figures as PNG. Beside
these five go the texts that a tokenizer consists of (`merges.txt`, `vocab.txt`, `*.jinja`) and, where there is no
tokenizer.json, SentencePiece's `tokenizer.model`: without them the model cannot be used, and none of them is run as code.
Every file is opened and must be what its name says; texts must hold no path of this machine and no token.
"""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Iterable
from pathlib import Path

from mechmerge.artifacts import parse_yaml, write_json, write_text
from mechmerge.errors import InputError
from mechmerge.models.checkpoint import is_side_file
from mechmerge.publish.plan import LocalFile
from mechmerge.recipe.schema import FOLDER

SUFFIXES = frozenset({".safetensors", ".json", ".yaml", ".md", ".png"})
TOKENIZER_TEXTS = ("merges.txt", "vocab.txt", "*.jinja")
SENTENCEPIECE = "tokenizer.model"
EVAL_RESULTS = ".eval_results/mechmerge.yaml"
WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
_VOCABULARIES = ("tokenizer.json", "vocab.*", "merges.txt")
_LOCAL_PATH = re.compile(r"(?:/home/|/Users/|/root/|[A-Za-z]:\\{1,2}Users\\{1,2})[^\s\"'`,;)]*")
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")
_PNG = b"\x89PNG\r\n\x1a\n"


def may_leave(name: str, beside: Iterable[str] = ()) -> bool:
    """Whether a file of this name may leave the machine.

    Args:
        name: the file's name.
        beside: names of the other files in its folder.
    """
    if Path(name).suffix in SUFFIXES or any(fnmatch.fnmatch(name, pattern) for pattern in TOKENIZER_TEXTS):
        return True
    return name == SENTENCEPIECE and "tokenizer.json" not in beside


def model_files(folder: Path, shards: Iterable[str]) -> tuple[list[str], list[str]]:
    """Files of a model folder that make the model, and those that stay here, by name.

    Args:
        folder: the model folder.
        shards: its weight files.
    """
    from mechmerge.models.checkpoint import INDEX, SINGLE

    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    weights = set(shards) | ({INDEX} if SINGLE not in set(shards) else set())
    go = [name for name in names if name in weights or (_is_side(name) and may_leave(name, names))]
    return go, [name for name in names if name not in go]


def _is_side(name: str) -> bool:
    return name == "config.json" or is_side_file(name)


def is_ours_in_model(path: str) -> bool:
    """Whether a path of a model repository is one that publishing fills."""
    if path.startswith(f"{FOLDER}/") or path in ("README.md", EVAL_RESULTS):
        return True
    return WEIGHTS.fullmatch(path) is not None or (_is_side(path) and may_leave(path))


class Packing:
    """A folder that is filled with exactly what goes out: links to the files, and what is written anew."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.paths: list[str] = []

    def link(self, path: str, source: Path) -> None:
        """Adds a file that lies elsewhere on this machine."""
        target = self._new(path)
        target.symlink_to(source.resolve())

    def text(self, path: str, text: str) -> None:
        """Adds a text."""
        write_text(self._new(path), text)

    def json(self, path: str, value: object) -> None:
        """Adds a document."""
        write_json(self._new(path), value)

    def _new(self, path: str) -> Path:
        if path in self.paths:
            raise InputError(path, expected="each file once", found="a second one")
        self.paths.append(path)
        target = self.folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        return target

    def files(self, private: Iterable[Path] = ()) -> tuple[LocalFile, ...]:
        """The files, each checked: it is what its name says, and holds nothing private.

        Args:
            private: folders of this machine that no text may name.

        Raises:
            InputError: the first file that may not leave.
        """
        names = [str(folder.resolve()) for folder in private]
        found = []
        for path in sorted(self.paths):
            check_content(path, self.folder / path)
            check_private(path, self.folder / path, names)
            found.append(LocalFile(path, self.folder / path))
        return tuple(found)


def check_content(path: str, file: Path) -> None:
    """Checks that a file is what its name says.

    Raises:
        InputError: it is something else.
    """
    from safetensors import SafetensorError, safe_open

    if not may_leave(Path(path).name):
        raise InputError(path, expected=f"a {', '.join(sorted(SUFFIXES))} file", found="another kind", fix="it stays here")
    suffix = file.suffix
    try:
        if suffix == ".safetensors":
            with safe_open(file, framework="numpy") as handle:
                handle.keys()
        elif suffix == ".png":
            with file.open("rb") as image:
                if image.read(8) != _PNG:
                    raise ValueError("no PNG signature")
        elif suffix == ".json":
            json.loads(file.read_text("utf-8"))
        elif suffix == ".yaml":
            parse_yaml(file.read_text("utf-8"), path)
        elif path != SENTENCEPIECE:
            file.read_text("utf-8")
    except (SafetensorError, ValueError, OSError, RecursionError, InputError) as error:
        found = f"{type(error).__name__}: {error}"[:160]
        raise InputError(path, expected=f"a real {suffix or Path(path).name} file", found=found) from None


def check_private(path: str, file: Path, private: Iterable[str] = ()) -> None:
    """Checks that a text, or the metadata of a safetensors file, names no path of this machine and no token.

    Raises:
        InputError: it does.
    """
    text = _text_of(path, file)
    token = _TOKEN.search(text)
    if token is not None:
        raise InputError(path, expected="no token", found="something that looks like one", fix="take it out, and revoke it")
    if any(fnmatch.fnmatch(Path(path).name, pattern) for pattern in _VOCABULARIES):
        return  # a vocabulary may hold any piece of text
    found = next((name for name in private if name != "/" and name in text), None)
    match = _LOCAL_PATH.search(text)
    found = match[0] if found is None and match is not None else found
    if found is not None:
        raise InputError(path, expected="no path of this machine", found=found[:80], fix="take it out of the file")


def _text_of(path: str, file: Path) -> str:
    if file.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(file, framework="numpy") as handle:
            return json.dumps(handle.metadata() or {}, ensure_ascii=False)
    if file.suffix == ".png" or path == SENTENCEPIECE:
        return ""
    return file.read_text("utf-8")
