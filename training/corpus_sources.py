"""Where the text of the shipped adapter comes from: Debian packages, what of them is read, and how it is cleaned."""

import gzip
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.documents import Document, read_text
from training.errors import TextError
from training.html_text import html_to_text
from training.plain_text import drop_contents, unwrap

MIN_CHARACTERS = 500  # what is shorter after cleaning is a page of links

HANDBOOK_NAVIGATION = ("#banner", "#title", ".docnav", ".toc", ".footer")
ANARCHISM_NAVIGATION = (".book-navigation",)
# Lists of links, of books, of the site's news; and pages that repeat others.
ANARCHISM_LEFT_OUT = frozenset(
    {"alinks", "arlinks", "biblio", "book", "contact", "index", "links", "new", "pdf", "supplementary", "translations"}
)
REFERENCE_NAVIGATION = (".navheader", ".navfooter", ".toc")
SPHINX_NAVIGATION = (".related", ".sphinxsidebar", ".footer", ".headerlink", ".toctree-wrapper")
DEVELOPERS_LEFT_OUT = frozenset({"developers-reference", "index", "search"})  # title page, contents
APACHE_NAVIGATION = ("#page-header", "#path", "#quickview", "#footer", ".toplang", ".bottomlang", ".permalink", ".top")
SQLITE_NAVIGATION = (".nosearch", "#mtimelink", ".imgcontainer")
# Lists of pages, requirements and releases, and a page that repeats another.
SQLITE_LEFT_OUT = ("doc_", "requirements", "keyword_index", "changes", "oldnews", "chronology", "news", "fileformat.")
DEBIAN_DOCUMENTS = (
    "bug-log-access.txt",
    "bug-log-mailserver.txt.gz",
    "bug-maint-info.txt.gz",
    "bug-maint-mailcontrol.txt.gz",
    "bug-reporting.txt.gz",
    "constitution.txt.gz",
    "debian-manifesto.gz",
    "social-contract.txt.gz",
    "source-unpack.txt",
)


@dataclass(frozen=True, slots=True)
class PackageText:
    """The text of one Debian package.

    Attributes:
        package: Name of the package.
        title: What it is.
        kind: Kind of text in the corpus.
        licence: Licence of the text, from the package's copyright file.
        copyright: Who holds the copyright, from the same file.
        subtree: Folder of the package that is read.
        read: Reads that folder and yields cleaned documents.
    """

    package: str
    title: str
    kind: str
    licence: str
    copyright: str
    subtree: str
    read: Callable[[Path], Iterator[Document]]


def read_handbook(folder: Path) -> Iterator[Document]:
    """The Debian Administrator's Handbook, one document for each page (`apt.html`)."""
    return _read_pages(folder, HANDBOOK_NAVIGATION, keep=lambda path: path.stem != "index")


def read_debian_documents(folder: Path) -> Iterator[Document]:
    """Texts of the Debian project (`constitution.txt`); of those with a history, the version in force."""
    for name in DEBIAN_DOCUMENTS:
        path = folder / name
        if not path.exists():  # other releases of Debian compress other files
            path = path.with_suffix("") if path.suffix == ".gz" else path.with_name(name + ".gz")
        yield from _document(name.removesuffix(".gz"), unwrap(read_text(path)))


def read_jargon_file(folder: Path) -> Iterator[Document]:
    """The Jargon File, one document."""
    text = drop_contents(unwrap(read_text(folder / "jargon.txt.gz")))
    yield from _document("jargon.txt", text.replace("{", "").replace("}", ""))  # braces mark cross references


def read_anarchist_faq(folder: Path) -> Iterator[Document]:
    """An Anarchist FAQ, one document for each page (`secH3.html`)."""

    def keep(path: Path) -> bool:
        return path.stem not in ANARCHISM_LEFT_OUT and not path.stem.endswith("con")  # secAcon: contents of a section

    return _read_pages(folder, ANARCHISM_NAVIGATION, keep=keep)


def read_austen(folder: Path) -> Iterator[Document]:
    """Jane Austen's novels, one document for each (`persuasion`)."""
    for name, lines in _read_r_data(folder / "Rdata").items():
        text = "\n".join(lines).split("A NOTE ON THE TEXT")[0]  # by the publisher of a modern edition
        yield from _document(name, unwrap(text).replace("_", ""))  # _emphasis_


def read_debian_reference(folder: Path) -> Iterator[Document]:
    """The Debian Reference, one document for each chapter (`debian-reference-ch04.en.html`)."""
    return _read_pages(folder, REFERENCE_NAVIGATION, pattern="ch*.html", prefix="debian-reference")


def read_developers_reference(folder: Path) -> Iterator[Document]:
    """The Debian Developer's Reference, one document for each chapter (`developers-reference-pkgs.html`)."""
    return _read_pages(
        folder,
        SPHINX_NAVIGATION,
        prefix="developers-reference",
        keep=lambda path: path.stem not in DEVELOPERS_LEFT_OUT,
    )


def read_apache_manual(folder: Path) -> Iterator[Document]:
    """Apache HTTP Server's manual in English, one document for each page (`apache-mod-core.html`)."""
    return _read_pages(folder, APACHE_NAVIGATION, pattern="**/*.html", prefix="apache")


def read_sqlite_manual(folder: Path) -> Iterator[Document]:
    """SQLite's documentation, one document for each page (`sqlite-lang_select.html`)."""
    return _read_pages(
        folder,
        SQLITE_NAVIGATION,
        prefix="sqlite",
        keep=lambda path: not path.name.startswith(SQLITE_LEFT_OUT),
        clean=lambda text: text.partition("\n\nThis page last modified")[0],
    )


SOURCES = (
    PackageText(
        "debian-handbook",
        "The Debian Administrator's Handbook",
        "technical",
        "GPL-2.0-or-later OR CC-BY-SA-3.0",
        "2003-2015 Raphaël Hertzog, 2006-2015 Roland Mas, 2013-2015 Freexian SARL",
        "usr/share/doc/debian-handbook/html/en-US",
        read_handbook,
    ),
    PackageText(
        "doc-debian",
        "Documents of the Debian project",
        "technical",
        "GPL (bug tracking system) and Open Publication License 1.0 (other documents)",
        "1999 Darren O. Benham, 1994-1997 Ian Jackson, 1997 nCipher Corporation Ltd, 1995 Steven Brenner; "
        "1997-2004 Software in the Public Interest, Inc.",
        "usr/share/doc/debian",
        read_debian_documents,
    ),
    PackageText(
        "jargon-text",
        "The Jargon File 4.4.7",
        "technical",
        "public domain",
        "none claimed; edited by Eric S. Raymond",
        "usr/share/doc/jargon-text",
        read_jargon_file,
    ),
    PackageText(
        "r-cran-janeaustenr",
        "The novels of Jane Austen",
        "narrative",
        "public domain (novels); MIT (the R package that holds them)",
        "2016-2017 Julia Silge (the R package)",
        "usr/lib/R/site-library/janeaustenr/data",
        read_austen,
    ),
    PackageText(
        "anarchism",
        "An Anarchist FAQ",
        "essay",
        "GPL-2.0-only",
        "1995-2017 The Anarchist FAQ Editorial Collective",
        "usr/share/doc/anarchism/html",
        read_anarchist_faq,
    ),
)

# More technical text than the shipped adapter was trained on, for longer runs.
EXTENDED_SOURCES = (
    *SOURCES,
    PackageText(
        "debian-reference-en",
        "Debian Reference",
        "technical",
        "GPL-2.0-or-later",
        "2007-2013 Osamu Aoki",
        "usr/share/debian-reference",
        read_debian_reference,
    ),
    PackageText(
        "developers-reference",
        "Debian Developer's Reference",
        "technical",
        "GPL-2.0-or-later",
        "1997-1998 Christian Schwarz, 1998-2003 Adam Di Carlo, 2002-2009 Raphaël Hertzog, 2004-2007 Andreas Barth, "
        "2008-2015 Lucas Nussbaum, 2015-2020 Hideki Yamane, 2019-2023 Holger Levsen",
        "usr/share/developers-reference",
        read_developers_reference,
    ),
    PackageText(
        "apache2-doc",
        "Manual of the Apache HTTP Server",
        "technical",
        "Apache-2.0",
        "2022 The Apache Software Foundation",
        "usr/share/doc/apache2-doc/manual/en",
        read_apache_manual,
    ),
    PackageText(
        "sqlite3-doc",
        "Documentation of SQLite",
        "technical",
        "public domain",
        "none claimed; D. Richard Hipp",
        "usr/share/doc/sqlite3",
        read_sqlite_manual,
    ),
)


def _read_pages(
    folder: Path,
    navigation: Sequence[str],
    *,
    pattern: str = "*.html",
    prefix: str = "",
    keep: Callable[[Path], bool] = lambda path: True,
    clean: Callable[[str], str] = str,
) -> Iterator[Document]:
    """HTML pages without their navigation, named after their paths."""
    for path in filter(keep, sorted(folder.glob(pattern))):
        name = "-".join(part for part in (prefix, *path.relative_to(folder).parts) if part)
        yield from _document(name, clean(html_to_text(read_text(path), navigation)))


def _document(name: str, text: str) -> Iterator[Document]:
    if len(text) >= MIN_CHARACTERS:
        yield Document(name, text)


def _read_r_data(stem: Path) -> dict[str, list[str]]:
    """Character vectors of an R package's lazy-load data base: an index (`.rdx`) of places in a file (`.rdb`)."""
    try:
        index = _convert(gzip.decompress(stem.with_suffix(".rdx").read_bytes()))["variables"]
        data = stem.with_suffix(".rdb").read_bytes()
        variables: dict[str, list[str]] = {}
        for name, (start, length) in index.items():
            # Four bytes of length, then a zlib stream ("compressed" type 1, R's default).
            value = _convert(zlib.decompress(data[int(start) + 4 : int(start) + int(length)]))
            variables[str(name)] = [str(line) for line in value]
    except (OSError, zlib.error, KeyError, ValueError, TypeError) as error:
        raise TextError(f"cannot read this R data base: {error}", stem.with_suffix(".rdx")) from error
    return variables


def _convert(data: bytes) -> Any:
    try:
        import rdata
    except ImportError as error:
        raise TextError("reading R data needs rdata: install siluette[train]") from error
    return rdata.conversion.convert(rdata.parser.parse_data(data, extension=".rds"))
