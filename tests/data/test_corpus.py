"""Sources of text and the split into training and held-out documents."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from counterflow.data.config import DataConfig
from counterflow.data.corpus import folder, hold_out, open_source, standard_library
from counterflow.settings import UsageError


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


def names(source) -> list[str]:
    return [document.name for document in source.documents()]


def test_folder_is_read_recursively_in_sorted_order(tmp_path: Path) -> None:
    files = {"b.txt": "b", "a/z.txt": "z", "a/c/d.md": "d", "a.py": "no match", "empty.txt": "", ".git/x.txt": "hidden"}
    source = folder(write(tmp_path, files), ["*.txt", "*.md"])
    assert names(source) == ["a/c/d.md", "a/z.txt", "b.txt"]
    assert [document.read() for document in source.documents()] == [b"d", b"z", b"b"]


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    write(tmp_path, {"corpus/one.txt": "1", "elsewhere/two.txt": "2"})
    os.symlink(tmp_path / "elsewhere", tmp_path / "corpus" / "linked")
    os.symlink(tmp_path / "corpus", tmp_path / "corpus" / "round")
    os.symlink(tmp_path / "nowhere", tmp_path / "corpus" / "dangling.txt")
    assert names(folder(tmp_path / "corpus", ["*.txt"])) == ["linked/two.txt", "one.txt"]


def test_missing_or_empty_folder_is_a_usage_error_with_path_and_patterns(tmp_path: Path) -> None:
    write(tmp_path, {"note.rst": "text", "empty.txt": ""})
    cases = [(tmp_path / "absent", "does not exist"), (tmp_path / "note.rst", "is not a folder"), (tmp_path, "no file")]
    for path, problem in cases:
        with pytest.raises(UsageError) as caught:
            open_source(DataConfig(source="folder", path=str(path), patterns=("*.txt", "*.md")))
        assert problem in str(caught.value)
        assert str(path) in str(caught.value)
        assert "*.txt, *.md" in str(caught.value)


def test_unreadable_file_is_a_usage_error_with_its_path(tmp_path: Path) -> None:
    source = folder(write(tmp_path, {"a.txt": "text"}), ["*.txt"])
    (tmp_path / "a.txt").unlink()
    with pytest.raises(UsageError, match=r"cannot read .*a\.txt"):
        next(source.documents()).read()


def test_config_wants_path_and_source_together() -> None:
    with pytest.raises(ValidationError, match="needs `path`"):
        DataConfig(source="folder")
    with pytest.raises(ValidationError, match="source: folder or remove"):
        DataConfig(path="texts")


def test_documented_configuration_is_valid() -> None:
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    section = yaml.safe_load(text.split("```yaml")[1].split("```")[0])["data"]
    assert set(section) == set(DataConfig.model_fields), "docs/data.md shows every key"
    assert DataConfig(**section).source == "folder"


def test_running_python_offers_real_text() -> None:
    source = standard_library()
    found = names(source)
    assert found == names(standard_library())
    assert {"argparse.py", "json/decoder.py", "email/message.py"} <= set(found)
    parts = {part for name in found for part in name.split("/")}
    assert parts.isdisjoint({"site-packages", "dist-packages", "__pycache__", "test", "tests", "encodings"})
    text = b"".join(document.read() for document in source.documents())
    assert len(text) > 4_000_000
    printable = sum(text.count(bytes([byte])) for byte in [*range(32, 127), 10])
    assert printable / len(text) > 0.99


def test_stripped_standard_library_works(tmp_path: Path) -> None:
    files = {"os.py": "import sys\n", "json/__init__.py": "# json\n", "site-packages/torch.py": "no\n"}
    files |= {"test/test_os.py": "no\n", "_sysconfigdata__linux.py": "no\n", "config-3.11/notes.txt": "no\n"}
    assert names(standard_library(write(tmp_path, files))) == ["json/__init__.py", "os.py"]
    for root in (tmp_path / "test", tmp_path / "python311.zip"):
        (tmp_path / "test" / "test_os.py").unlink(missing_ok=True)
        with pytest.raises(UsageError, match="source: folder"):
            standard_library(root)


def test_topics_of_the_manual_are_documents_without_repeats(tmp_path: Path) -> None:
    about = [f"{word} paragraph about {word} statements" for word in ("first", "second", "third", "fourth")]
    topics = {"whole": "\n\n".join(about), "part": f"{about[0]}\n\n   {about[1]}", "own": f"{about[2]} alone\n\nnew"}
    root = write(tmp_path, {"pydoc_data/topics.py": f"# generated\ntopics = {topics!r}\n", "os.py": "import sys\n"})
    documents = {document.name: document.read().decode() for document in standard_library(root).documents()}
    assert documents == {
        "os.py": "import sys\n",
        "pydoc_data/topics.py/own": topics["own"],
        "pydoc_data/topics.py/whole": topics["whole"],
    }


def test_topics_in_another_form_are_read_as_source(tmp_path: Path) -> None:
    root = write(tmp_path, {"pydoc_data/topics.py": "topics = load()\n"})
    assert names(standard_library(root)) == ["pydoc_data/topics.py"]


@given(st.sets(st.text(min_size=1, max_size=5), min_size=2, max_size=20), st.floats(0.01, 0.99), st.randoms())
def test_both_splits_get_documents_whatever_their_order(found: set[str], fraction: float, order: random.Random) -> None:
    held_out = hold_out(sorted(found), fraction)
    assert held_out < found
    assert held_out
    shuffled = sorted(found)
    order.shuffle(shuffled)
    assert hold_out(shuffled, fraction) == held_out


def test_a_document_keeps_its_split_when_others_are_added() -> None:
    few = [f"texts/{number}.txt" for number in range(2000)]
    more = [*few, *(f"other/{number}.md" for number in range(3000))]
    held_out = hold_out(few, 0.1)
    assert held_out == hold_out(more, 0.1) & set(few)
    assert held_out < hold_out(few, 0.2)
    assert 150 < len(held_out) < 250  # 200 expected, deviation 13.4


def test_one_document_cannot_be_split() -> None:
    with pytest.raises(UsageError, match="1 document, but training and validation need at least one each"):
        hold_out(["input.txt"], 0.05)
