from pathlib import Path

import pytest

from tests.training.packages import corpus_files, prose
from training.corpus_sources import EXTENDED_SOURCES, SOURCES, PackageText
from training.documents import Document
from training.errors import TextError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    for files in corpus_files(scratch).values():
        for name, data in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    return tmp_path


def source(package: str) -> PackageText:
    return next(source for source in EXTENDED_SOURCES if source.package == package)


def documents(root: Path, package: str) -> dict[str, object]:
    read = list(source(package).read(root / source(package).subtree))
    assert all(isinstance(document, Document) for document in read)
    return {document.name: document.content for document in read}


def test_handbook_pages_have_headings_and_no_navigation(root: Path) -> None:
    pages = documents(root, "debian-handbook")
    assert sorted(pages) == [
        "apt.html",
        "network-services.html",
        "sect.apt-get.html",
        "sect.ipv6.html",
        "security.html",
    ]
    assert pages["apt.html"] == f"About apt\n\n{prose('apt')}"


def test_debian_documents_are_unwrapped_and_old_versions_left_out(root: Path) -> None:
    texts = documents(root, "doc-debian")
    assert texts["constitution.txt"] == prose("constitution")
    assert texts["debian-manifesto"] == prose("manifesto")
    assert len(texts) == 9


def test_jargon_file_has_no_table_of_contents_and_no_braces(root: Path) -> None:
    assert documents(root, "jargon-text") == {"jargon.txt": f":hack: n.\n\n{prose('hack')}"}


def test_manuals_have_headings_and_no_navigation_and_names_that_differ(root: Path) -> None:
    packages = ("debian-reference-en", "developers-reference", "apache2-doc", "sqlite3-doc")
    manuals = {name: text for package in packages for name, text in documents(root, package).items()}
    assert manuals == {
        f"{file}.html": f"{heading}\n\n{prose(heading)}"
        for file, heading in {
            "debian-reference-ch01.en": "tutorial",
            "developers-reference-pkgs": "pkgs",
            "apache-logs": "logs",
            "apache-mod-core": "core",
            "sqlite-lang": "lang",
        }.items()
    }


def test_novels_have_paragraphs_without_marks(root: Path) -> None:
    novels = documents(root, "r-cran-janeaustenr")
    assert sorted(novels) == ["emma", "persuasion"]
    assert novels["emma"] == f"EMMA\n\nCHAPTER I\n\n{prose('emma')}\n\nIndeed!"


def test_essays_have_no_navigation_and_pages_of_links_are_left_out(root: Path) -> None:
    essays = documents(root, "anarchism")
    assert sorted(essays) == ["append31.html", "secA1.html", "secH3.html"]
    assert essays["secH3.html"] == f"secH3\n\n{prose('secH3')}"


def test_every_source_states_its_licence() -> None:
    assert {source.kind for source in SOURCES} == {"technical", "narrative", "essay"}
    assert all(source.licence and source.copyright and source.title for source in EXTENDED_SOURCES)


def test_damaged_r_data_is_named(root: Path) -> None:
    folder = root / source("r-cran-janeaustenr").subtree
    (folder / "Rdata.rdb").write_bytes(b"damaged")
    with pytest.raises(TextError, match=r"Rdata\.rdx: cannot read this R data base"):
        documents(root, "r-cran-janeaustenr")
