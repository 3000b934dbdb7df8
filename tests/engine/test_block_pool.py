import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.block_pool import BlockPool

TOKENS = (1, 2, 3)
OTHER = (4, 5, 6)
ROOT = 0  # the name of what comes before a first block


def names_of(pool: BlockPool, blocks: list[int], parent: int = ROOT) -> list[int]:
    """Register blocks as a chain with tokens (0,), (1,), ... and return their names."""
    names = []
    for index, block in enumerate(blocks):
        parent = pool.register(block, parent, (index,), None)
        names.append(parent)
    return names


def test_a_new_pool_is_free():
    pool = BlockPool(4)
    assert (pool.num_free, pool.num_cached) == (4, 0)
    assert all(pool.is_free(block) for block in range(4))


def test_allocated_blocks_are_distinct_and_held():
    pool = BlockPool(4)

    blocks = pool.allocate(3)

    assert len(set(blocks)) == 3
    assert set(blocks) <= set(range(4))
    assert pool.num_free == 1
    assert not any(pool.is_free(block) for block in blocks)


def test_a_released_block_is_free_again():
    pool = BlockPool(2)
    blocks = pool.allocate(2)

    pool.release(blocks)

    assert pool.num_free == 2
    assert sorted(pool.allocate(2)) == sorted(blocks)


def test_a_block_is_free_when_its_last_holder_releases_it():
    pool = BlockPool(1)
    (block,) = pool.allocate(1)
    pool.hold(block)

    pool.release([block])
    assert not pool.is_free(block)

    pool.release([block])
    assert pool.is_free(block)


class TestFindingContent:
    def test_a_registered_block_is_found_by_its_content(self):
        pool = BlockPool(2)
        (block,) = pool.allocate(1)

        name = pool.register(block, ROOT, TOKENS, None)

        assert pool.match(ROOT, TOKENS, None) == (block, name)

    @pytest.mark.parametrize(
        ("parent", "tokens", "fingerprint"),
        [(99, TOKENS, None), (ROOT, OTHER, None), (ROOT, TOKENS, (1, 2, 3, 0, 0)), (ROOT, TOKENS[:2], None)],
        ids=["parent", "tokens", "activation", "length"],
    )
    def test_other_content_is_not_found(self, parent, tokens, fingerprint):
        pool = BlockPool(2)
        (block,) = pool.allocate(1)
        pool.register(block, ROOT, TOKENS, None)

        assert pool.match(parent, tokens, fingerprint) is None

    def test_tokens_whose_hashes_collide_are_told_apart(self):
        pool = BlockPool(2)
        (block,) = pool.allocate(1)
        pool.register(block, ROOT, (-1,), None)
        assert hash((-1,)) == hash((-2,))

        assert pool.match(ROOT, (-2,), None) is None

    def test_equal_tokens_after_different_beginnings_have_different_names(self):
        pool = BlockPool(4)
        first, second, third, fourth = pool.allocate(4)
        one = pool.register(first, ROOT, TOKENS, None)
        two = pool.register(second, ROOT, OTHER, None)

        assert pool.register(third, one, TOKENS, None) != pool.register(fourth, two, TOKENS, None)
        assert pool.match(one, TOKENS, None)[0] == third
        assert pool.match(two, TOKENS, None)[0] == fourth

    def test_an_equal_block_gets_the_name_of_the_first_and_the_first_stays_the_one_that_is_found(self):
        pool = BlockPool(2)
        first, second = pool.allocate(2)
        name = pool.register(first, ROOT, TOKENS, None)

        assert pool.register(second, ROOT, TOKENS, None) == name
        assert pool.match(ROOT, TOKENS, None) == (first, name)

    def test_a_forgotten_block_is_not_found(self):
        pool = BlockPool(1)
        (block,) = pool.allocate(1)
        pool.register(block, ROOT, TOKENS, None)

        pool.forget(block)
        pool.forget(block)

        assert pool.match(ROOT, TOKENS, None) is None

    def test_a_name_is_never_given_to_two_contents(self):
        pool = BlockPool(1)
        names = []
        for token in range(5):
            (block,) = pool.allocate(1)
            names.append(pool.register(block, ROOT, (token,), None))
            pool.release([block])

        assert len(set(names)) == 5

    def test_without_prefix_caching_nothing_is_found(self):
        pool = BlockPool(1, prefix_caching=False)
        (block,) = pool.allocate(1)

        pool.register(block, ROOT, TOKENS, None)
        pool.release([block])

        assert pool.match(ROOT, TOKENS, None) is None
        assert pool.num_cached == 0


class TestEviction:
    def test_content_outlives_its_holder_until_the_block_is_needed(self):
        pool = BlockPool(1)
        (block,) = pool.allocate(1)
        pool.register(block, ROOT, TOKENS, None)

        pool.release([block])
        assert pool.match(ROOT, TOKENS, None) is not None
        assert pool.num_cached == 1

        pool.allocate(1)
        assert pool.match(ROOT, TOKENS, None) is None
        assert pool.num_cached == 0

    def test_the_least_recently_released_content_goes_first(self):
        pool = BlockPool(3)
        blocks = pool.allocate(3)
        for token, block in enumerate(blocks):
            pool.register(block, ROOT, (token,), None)
        for index in (1, 2, 0):
            pool.release([blocks[index]])

        assert pool.allocate(3) == [blocks[1], blocks[2], blocks[0]]

    def test_a_hit_makes_content_recent(self):
        pool = BlockPool(2)
        old, new = pool.allocate(2)
        pool.register(old, ROOT, (0,), None)
        pool.register(new, ROOT, (1,), None)
        pool.release([old])
        pool.release([new])

        pool.hold(old)
        pool.release([old])

        assert pool.allocate(2) == [new, old]

    def test_of_one_sequence_the_end_goes_first(self):
        pool = BlockPool(3)
        blocks = pool.allocate(3)
        names_of(pool, blocks)

        pool.release(blocks)

        assert pool.allocate(3) == blocks[::-1]

    def test_blocks_without_content_go_before_any_content(self):
        pool = BlockPool(3)
        known, unknown, other = pool.allocate(3)
        pool.register(known, ROOT, TOKENS, None)
        pool.register(other, ROOT, OTHER, None)

        pool.release([known])
        pool.release([unknown])
        pool.release([other])

        assert pool.allocate(3) == [unknown, known, other]

    def test_held_content_is_never_evicted(self):
        pool = BlockPool(2)
        held, other = pool.allocate(2)
        pool.register(held, ROOT, TOKENS, None)
        pool.release([other])

        assert pool.allocate(1) == [other]
        assert pool.match(ROOT, TOKENS, None)[0] == held

    def test_a_hit_on_a_free_block_takes_it_out_of_reach(self):
        pool = BlockPool(2)
        known, other = pool.allocate(2)
        pool.register(known, ROOT, TOKENS, None)
        pool.release([known, other])

        pool.hold(known)

        assert pool.num_free == 1
        assert pool.allocate(1) == [other]

    def test_a_chain_with_an_evicted_beginning_is_not_found_under_a_new_name(self):
        pool = BlockPool(3)
        first, second, third = pool.allocate(3)
        name, _ = names_of(pool, [first, second])
        pool.release([first, third])
        pool.allocate(2)  # evicts the first block's content; the second is held

        again = pool.register(third, ROOT, (0,), None)

        assert again != name
        assert pool.match(again, (1,), None) is None


OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["allocate", "release", "hold", "register"]), st.integers(0, 5)), max_size=60
)


@settings(max_examples=500, deadline=None)
@given(operations=OPERATIONS)
def test_a_match_is_always_the_block_that_last_got_the_content(operations: list[tuple[str, int]]) -> None:
    """The pool against a list of holders and a dictionary of contents, kept by hand."""
    pool = BlockPool(5)
    held: list[int] = []  # with one entry for each reference
    contents: dict[int, tuple[int, ...]] = {}
    for operation, number in operations:
        if operation == "allocate" and pool.num_free > 0:
            (block,) = pool.allocate(1)
            assert block not in held
            contents.pop(block, None)
            held.append(block)
        elif operation == "release" and held:
            pool.release([held.pop(number % len(held))])
        elif operation == "hold" and (found := pool.match(ROOT, (number,), None)) is not None:
            pool.hold(found[0])
            held.append(found[0])
        elif operation == "register" and held:
            block = held[number % len(held)]
            if block not in contents and (number,) not in contents.values():
                pool.register(block, ROOT, (number,), None)
                contents[block] = (number,)
        assert pool.num_free == pool.num_blocks - len(set(held))
        assert pool.num_cached == len(set(contents) - set(held))
        for token in range(6):
            found = pool.match(ROOT, (token,), None)
            assert (found and contents[found[0]]) == ((token,) if (token,) in contents.values() else None)
