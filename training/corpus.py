"""The text that the shipped adapter is trained and measured on, made anew from Debian packages.

    python -m training.corpus --output corpus --chats chats.jsonl

writes `corpus/KIND/train/` and `corpus/KIND/held_out/` for each kind of text, `corpus/corpus.json`, which says where
everything came from and under which licence, and `corpus/quiz/`, question data for the evaluation. Training text that
shares a run of 13 words with held-out text is removed.
"""

import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated

import typer

from training.conversations import Conversation, append_batch, read_conversations
from training.corpus_sources import EXTENDED_SOURCES, SOURCES, PackageText
from training.debian_packages import fetch_package, package_version, unpack_package
from training.documents import Document
from training.errors import CorpusError, TrainingError
from training.overlap import NGRAM, HeldOutText
from training.text import split_documents

HELD_OUT = {
    "technical": ("apt.html", "network-services.html", "sect.apt-get.html"),
    "narrative": ("persuasion",),
    "essay": ("secH3*",),
}
CHAT = "chat"
CHAT_HELD_OUT = 0.1  # the last conversations
MAX_OVERLAP = 0.001  # chance joins of what is left around removed paragraphs; measured: see corpus.json
QUIZ_PACKAGE, QUIZ_FOLDER = "bsdgames", "usr/share/games/bsdgames/quiz"


@dataclass(frozen=True, slots=True)
class CorpusKind:
    """Text of one kind, split.

    Attributes:
        train: Documents to train on; for chats, a name and what was said.
        held_out: Documents to measure on.
        overlap_before: Share of the held-out runs of words that occurred in training text of any kind at first.
        overlap: The same of what is left.
        removed: Paragraphs (of chats: conversations) of this kind's training text that were removed for it.
    """

    train: tuple[Document, ...]
    held_out: tuple[Document, ...]
    overlap_before: float
    overlap: float
    removed: int


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where text came from, for the model card."""

    package: str
    version: str
    sha256: str
    title: str
    kind: str
    licence: str
    copyright: str


def build_corpus(
    documents: Mapping[str, Sequence[Document]],
    held_out: Mapping[str, Sequence[str]],
    whole: Sequence[str] = (CHAT,),
) -> dict[str, CorpusKind]:
    """Split each kind of text and remove from all training text what is held out anywhere.

    Args:
        documents: Plain-text documents of each kind.
        held_out: Patterns of the names of documents to hold out, of each kind.
        whole: Kinds whose documents are removed as a whole, not by paragraphs.

    Returns:
        The split kinds.

    Raises:
        CorpusError: Held-out text is too short to be compared.
        TextError: A pattern matches no document.
    """
    splits = {kind: split_documents(items, held_out[kind]) for kind, items in documents.items()}
    everything = HeldOutText(_text(document) for _, held in splits.values() for document in held)
    removed: dict[str, int] = {}
    cleaned: dict[str, list[Document]] = {}
    for kind, (train, _) in splits.items():
        cleaned[kind], removed[kind] = _clean(train, everything, whole=kind in whole)
    train_before = [_text(document) for train, _ in splits.values() for document in train]
    train_after = [_text(document) for train in cleaned.values() for document in train]
    kinds = {}
    for kind, (_, held) in splits.items():
        runs = HeldOutText(_text(document) for document in held)
        before, after = runs.overlap(train_before), runs.overlap(train_after)
        kinds[kind] = CorpusKind(tuple(cleaned[kind]), tuple(held), before, after, removed[kind])
    return kinds


def check_overlap(kinds: Mapping[str, CorpusKind], limit: float = MAX_OVERLAP) -> None:
    """Refuse a corpus whose training text holds held-out text.

    Raises:
        CorpusError: More than `limit` of a kind's held-out runs of words occur in training text; says how many.
    """
    for name, kind in kinds.items():
        if kind.overlap > limit:
            raise CorpusError(
                f"{kind.overlap:.2%} of the runs of {NGRAM} words in the held-out {name} text occur in training text; "
                f"at most {limit:.2%} may"
            )


def split_chats(
    conversations: Sequence[Conversation], share: float = CHAT_HELD_OUT
) -> tuple[list[Document], tuple[str, ...]]:
    """Conversations as documents, and the names of the last `share` of them, which are held out."""
    documents = [Document(f"{number:06d}", chat.spoken) for number, chat in enumerate(conversations)]
    first = len(documents) - max(1, round(share * len(documents)))
    return documents, tuple(document.name for document in documents[first:])


def read_packages(
    folder: Path,
    quiz: Path,
    *,
    sources: Sequence[PackageText] = SOURCES,
    mirror: str | None = None,
    suite: str = "stable",
    report: Callable[[str], None] = lambda line: None,
) -> tuple[dict[str, list[Document]], list[Provenance]]:
    """Fetch all packages and read their documents.

    Args:
        folder: Keeps the packages' files.
        quiz: Folder that the question data for the evaluation go to.
        sources: What to fetch.
        mirror: See `fetch_package`.
        suite: See `fetch_package`.
        report: Called with a line of text about each package.

    Returns:
        Documents of each kind, where they came from.

    Raises:
        PackageError: A package cannot be had or unpacked.
        TextError: A package holds something else than expected.
    """
    documents: dict[str, list[Document]] = {}
    provenance = []
    for source in sources:
        deb = fetch_package(source.package, folder, mirror=mirror, suite=suite)
        with tempfile.TemporaryDirectory() as temporary:
            unpack_package(deb, Path(temporary), source.subtree)
            texts = list(source.read(Path(temporary) / source.subtree))
        documents.setdefault(source.kind, []).extend(texts)
        provenance.append(_provenance(source, deb))
        report(f"{source.package}: {len(texts)} documents, {sum(map(len, map(_text, texts))):,} characters")
    _unpack_quiz(fetch_package(QUIZ_PACKAGE, folder, mirror=mirror, suite=suite), quiz)
    return documents, provenance


def write_corpus(
    output: Path, kinds: Mapping[str, CorpusKind], provenance: Sequence[Provenance], chats: Sequence[Conversation] = ()
) -> None:
    """Write a corpus. Files of an earlier one are replaced.

    Args:
        output: Folder to write to.
        kinds: The split text.
        provenance: Where it came from.
        chats: Conversations that the documents of the kind `chat` number: they are written with their tokens.

    Raises:
        CorpusError: Two documents would get the same file name.
    """
    for name, kind in kinds.items():
        for split, documents in (("train", kind.train), ("held_out", kind.held_out)):
            folder = output / name / split
            folder.mkdir(parents=True, exist_ok=True)
            for stale in [*folder.glob("*.txt"), *folder.glob("*.jsonl")]:
                stale.unlink()
            if name == CHAT:
                append_batch(folder / "chat.jsonl", 0, 0, [chats[int(document.name)] for document in documents])
                continue
            for document in documents:
                path = folder / f"{_file_stem(document.name)}.txt"
                if path.exists():
                    raise CorpusError(f"two documents of the kind {name} would be written to {path.name}")
                path.write_text(_text(document) + "\n", encoding="utf-8", newline="\n")
    summary = {
        "sources": [asdict(item) for item in provenance],
        "kinds": {name: _summary(kind) for name, kind in kinds.items()},
        "overlap_words": NGRAM,
        "max_overlap": MAX_OVERLAP,
    }
    path = output / "corpus.json"
    path.write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main(
    output: Annotated[Path, typer.Option(help="Folder to write to.")],
    packages: Annotated[
        Path | None, typer.Option(help="Folder that keeps the packages' files.", show_default="OUTPUT/packages")
    ] = None,
    chats: Annotated[Path | None, typer.Option(help="Conversations, written by training.self_generation.")] = None,
    mirror: Annotated[str | None, typer.Option(help="Address of a Debian mirror, where there is no apt-get.")] = None,
    suite: Annotated[str, typer.Option(help="Suite of the mirror.")] = "stable",
    extended: Annotated[
        bool, typer.Option("--extended", help="With four more manuals than the shipped adapter was trained on.")
    ] = False,
) -> None:
    """Build the corpus of the shipped adapter, and check that no held-out text is in the training text."""
    try:
        documents, provenance = read_packages(
            packages or output / "packages",
            output / "quiz",
            sources=EXTENDED_SOURCES if extended else SOURCES,
            mirror=mirror,
            suite=suite,
            report=typer.echo,
        )
        held_out: dict[str, Sequence[str]] = dict(HELD_OUT)
        conversations = list(read_conversations(chats)) if chats is not None else []
        if conversations:
            documents[CHAT], held_out[CHAT] = split_chats(conversations)
        kinds = build_corpus(documents, held_out)
        for name, kind in kinds.items():
            typer.echo(
                f"{name}: {len(kind.train)} documents to train on, {len(kind.held_out)} held out; held-out text found "
                f"in training text: {kind.overlap_before:.3%}, after removing {kind.removed} paragraphs: "
                f"{kind.overlap:.3%}"
            )
        check_overlap(kinds)
        write_corpus(output, kinds, provenance, conversations)
    except TrainingError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error


def _clean(documents: Sequence[Document], held_out: HeldOutText, *, whole: bool) -> tuple[list[Document], int]:
    """Documents without held-out text, and how many pieces that cost."""
    cleaned = []
    removed = 0
    for document in documents:
        if whole:
            if held_out.occurs_in(_text(document)):
                removed += 1
            else:
                cleaned.append(document)
            continue
        text, pieces = held_out.remove_from(_text(document))
        removed += pieces
        if text:
            cleaned.append(Document(document.name, text))
    return cleaned, removed


def _text(document: Document) -> str:
    if not isinstance(document.content, str):
        raise CorpusError(f"{document.name}: a corpus is built of plain text only")
    return document.content


def _file_stem(name: str) -> str:
    path = PurePosixPath(name)
    return path.stem if path.suffix in (".html", ".txt") else path.name


def _summary(kind: CorpusKind) -> dict[str, float]:
    return {
        "train_documents": len(kind.train),
        "train_characters": sum(len(_text(document)) for document in kind.train),
        "held_out_documents": len(kind.held_out),
        "held_out_characters": sum(len(_text(document)) for document in kind.held_out),
        "overlap_before": kind.overlap_before,
        "overlap": kind.overlap,
        "removed": kind.removed,
    }


def _provenance(source: PackageText, deb: Path) -> Provenance:
    digest = hashlib.sha256(deb.read_bytes()).hexdigest()
    return Provenance(
        source.package,
        package_version(deb),
        digest,
        source.title,
        source.kind,
        source.licence,
        source.copyright,
    )


def _unpack_quiz(deb: Path, folder: Path) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        unpack_package(deb, Path(temporary), QUIZ_FOLDER)
        folder.mkdir(parents=True, exist_ok=True)
        for path in (Path(temporary) / QUIZ_FOLDER).iterdir():
            (folder / path.name).write_bytes(path.read_bytes())


if __name__ == "__main__":
    typer.run(main)
