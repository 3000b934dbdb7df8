"""Small Debian packages that look like those of the corpus."""

import gzip
import io
import lzma
import struct
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import rdata

COMPRESS = {"xz": lzma.compress, "gz": gzip.compress}
FILLER = 40  # sentences: a document must have some length


def prose(name: str, sentences: int = FILLER) -> str:
    """Sentences that no other name has a run of words of."""
    return " ".join(
        f"Sentence {number} of {name} says something {name}{number} of its own." for number in range(sentences)
    )


def make_tar(files: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def make_deb(members: Mapping[str, bytes]) -> bytes:
    """An `ar` archive, as `ar` writes it."""
    parts = [b"!<arch>\n"]
    for name, data in members.items():
        parts.append(f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(data):<10}`\n".encode() + data)
        parts.append(b"\n" * (len(data) % 2))
    return b"".join(parts)


def write_deb(path: Path, files: Mapping[str, bytes], compression: str = "xz") -> Path:
    """Write a Debian package of files by their paths."""
    members = {
        "debian-binary": b"2.0\n",
        "control.tar.xz": lzma.compress(make_tar({"control": b"odd"})),
        f"data.tar.{compression}": COMPRESS[compression](make_tar(files)),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(make_deb(members))
    return path


def r_data(folder: Path, variables: Mapping[str, Sequence[str]]) -> dict[str, bytes]:
    """Files of R's lazy-load data base of character vectors; `folder` is for scratch files."""

    def serialised(value: object) -> bytes:
        path = folder / "value.rds"
        rdata.write_rds(path, value, compression="gzip")
        return gzip.decompress(path.read_bytes())

    data = b""
    places = {}
    for name, lines in variables.items():
        value = serialised(np.array(lines))
        blob = struct.pack(">I", len(value)) + zlib.compress(value)
        places[name] = np.array([len(data), len(blob)], dtype=np.int32)
        data += blob
    index = {"variables": places, "references": {}, "compressed": True}
    return {"Rdata.rdx": gzip.compress(serialised(index)), "Rdata.rdb": data}


def corpus_files(scratch: Path) -> dict[str, dict[str, bytes]]:
    """Files of each package that the corpus is made of, by their paths."""

    def page(name: str) -> bytes:
        return (
            f'<html><head><title>{name}</title></head><body><p id="title"><a>Product Site</a></p>'
            f'<ul class="docnav top"><li>Prev</li></ul><h2 class="title">About {name}</h2>'
            f'<div class="toc">Contents</div><p>{prose(name)}</p><ul class="docnav"><li>Next</li></ul></body></html>'
        ).encode()

    def essay(name: str, more: str = "") -> bytes:
        return (
            f"<body><h1>{name}</h1><p>{prose(name)}</p>{more}"
            '<div class="book-navigation"><div class="page-links"><a>up</a></div></div></body>'
        ).encode()

    def manual(name: str, before: str, after: str) -> bytes:
        return f"<body>{before}<h1>{name}</h1><p>{prose(name)}</p>{after}</body>".encode()

    sphinx = '<div class="related">Navigation</div>', '<div class="footer">Created using Sphinx</div>'
    apache = '<div id="page-header">Modules</div>', '<div class="bottomlang">en | fr</div><div id="footer">Apache</div>'
    sqlite = "<div class=nosearch>Small. Fast.</div>", '<p align="center">This page last modified on</p>'
    handbook = "usr/share/doc/debian-handbook/html/en-US/"
    pages = ("apt", "network-services", "sect.apt-get", "sect.ipv6", "security", "index")
    debian = "usr/share/doc/debian/"
    documents = ("bug-log-access", "bug-log-mailserver", "bug-maint-info", "bug-maint-mailcontrol", "bug-reporting")
    documents = (*documents, "constitution", "social-contract", "source-unpack", "constitution.1.0")
    essays = "usr/share/doc/anarchism/html/"
    quotation = f"<blockquote><p>{prose('secH3', 5)}</p></blockquote>"
    novels = {
        name: [
            name.upper(),
            "",
            "CHAPTER I",
            "",
            *wrap(prose(name)),
            "",
            "_Indeed!_",
            "",
            "A NOTE ON THE TEXT",
            "",
            "x",
        ]
        for name in ("emma", "persuasion")
    }
    austen = "usr/lib/R/site-library/janeaustenr/data/"
    contents = "\n\n".join(f"   entry {number}" for number in range(20))
    jargon = f"The File\n\n{contents}\n\n   :hack: n.\n\n" + "\n".join(f"   {line}" for line in wrap(prose("{hack}")))
    return {
        "debian-handbook": {
            **{f"{handbook}{name}.html": page(name.replace(".", "")) for name in pages},
            "usr/share/doc/debian-handbook/html/de-DE/apt.html": page("deutsch"),
        },
        "doc-debian": {
            **{f"{debian}{name}.txt": "\n".join(wrap(prose(name.replace("-", "")))).encode() for name in documents},
            f"{debian}debian-manifesto.gz": gzip.compress(prose("manifesto").encode()),
        },
        "jargon-text": {"usr/share/doc/jargon-text/jargon.txt.gz": gzip.compress(jargon.encode())},
        "debian-reference-en": {
            "usr/share/debian-reference/ch01.en.html": manual("tutorial", '<div class="navheader">Chapter 1</div>', ""),
            "usr/share/debian-reference/index.en.html": manual("contents", "", ""),
        },
        "developers-reference": {
            f"usr/share/developers-reference/{name}.html": manual(name, *sphinx) for name in ("pkgs", "index")
        },
        "apache2-doc": {
            "usr/share/doc/apache2-doc/manual/en/logs.html": manual("logs", *apache),
            "usr/share/doc/apache2-doc/manual/en/mod/core.html": manual("core", *apache),
            "usr/share/doc/apache2-doc/manual/fr/logs.html": manual("journaux", *apache),
        },
        "sqlite3-doc": {
            f"usr/share/doc/sqlite3/{name}.html": manual(name, *sqlite) for name in ("lang", "doc_pagelink", "news")
        },
        "r-cran-janeaustenr": {austen + name: data for name, data in r_data(scratch, novels).items()},
        "anarchism": {
            f"{essays}secH3.html": essay("secH3"),
            f"{essays}append31.html": essay("append31", quotation),
            f"{essays}secHcon.html": essay("secHcon"),
            f"{essays}links.html": essay("links"),
            f"{essays}secA1.html": essay("secA1"),
        },
        "bsdgames": {
            "usr/share/games/bsdgames/quiz/europe": b"France:Paris\n",
            "usr/share/games/bsdgames/hack/data": b"-",
        },
    }


def wrap(text: str) -> list[str]:
    """Lines of a screen."""
    import textwrap

    return textwrap.wrap(text, 72)
