"""Bytes of tokens, whose spelling in byte-level vocabularies is GPT-2's."""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from engine.token_bytes import token_bytes

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())  # GPT-2's


def byte_level(tokens: list[str], added: list[AddedToken]) -> Tokenizer:
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens(added)
    return backend


def test_every_character_of_the_alphabet_is_a_byte() -> None:
    found = token_bytes(byte_level(ALPHABET, [])).all

    assert sorted(found) == [bytes([byte]) for byte in range(256)]
    assert found[ALPHABET.index("\u0120")] == b" "


def test_tokens_outside_the_alphabet_stand_for_themselves_and_leave_the_others_alone() -> None:
    tokens = ["a", "\u0120b", "\u65e5\u672c", "", "c d", "\u00c3\u00a9", "\U0001f600x", "z"]
    added = [AddedToken("<|\u0120end \u2581|>", special=True), AddedToken("\u0120user", special=False)]

    found = token_bytes(byte_level(tokens, added))

    expected = [b"a", b" b", "\u65e5\u672c".encode(), b"", b"c d", "\u00e9".encode(), "\U0001f600x".encode(), b"z"]
    assert list(found.all) == [*expected, "<|\u0120end \u2581|>".encode(), "\u0120user".encode()]
    assert found.visible[-2:] == (b"", "\u0120user".encode())
