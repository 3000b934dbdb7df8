"""Who holds which block of the KV cache, and which blocks can be found again by their content."""

from collections import OrderedDict
from collections.abc import Sequence as SequenceOf

from engine.request import Fingerprint

# A block's content: the name of the block before it (0 at the beginning), its tokens and how they were activated.
# The whole key is compared, not a hash of it, so that a collision cannot hand out someone else's text.
ContentKey = tuple[int, tuple[int, ...], Fingerprint]


class BlockPool:
    """Reference-counted blocks with a prefix cache.

    A released block whose content is known stays findable until it is needed for something else; the least recently
    released goes first.

    Args:
        num_blocks: Size of the pool.
        prefix_caching: Whether contents are remembered.
    """

    def __init__(self, num_blocks: int, prefix_caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self.prefix_caching = prefix_caching
        self._references = [0] * num_blocks
        self._content: list[tuple[ContentKey, int] | None] = [None] * num_blocks  # with the name of the content
        self._found: dict[ContentKey, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._next_name = 1
        # Counted as it changes: other threads read it, and must not walk over a dict that this one changes.
        self.num_cached = 0  # blocks that nobody holds and whose content can still be found

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Take `count` free blocks, forgetting what they held. The caller has checked `num_free`."""
        blocks = []
        for _ in range(count):
            block, _ = self._free.popitem(last=False)
            self.forget(block)
            self._references[block] = 1
            blocks.append(block)
        return blocks

    def release(self, blocks: SequenceOf[int]) -> None:
        """Give up a sequence's blocks, given in their order in the sequence."""
        # The end of a sequence is the least useful for others, so it is the first to be taken again.
        for block in reversed(blocks):
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free[block] = None
                if self._content[block] is None:
                    self._free.move_to_end(block, last=False)
                else:
                    self.num_cached += 1

    def match(self, parent: int, tokens: tuple[int, ...], fingerprint: Fingerprint) -> tuple[int, int] | None:
        """Find a block with this content.

        Returns:
            The block and the name of its content (the `parent` of the next block), or None. The caller holds nothing
            yet.
        """
        block = self._found.get((parent, tokens, fingerprint))
        if block is None:
            return None
        content = self._content[block]
        assert content is not None
        return block, content[1]

    def is_free(self, block: int) -> bool:
        """Whether nobody holds the block."""
        return self._references[block] == 0

    def hold(self, block: int) -> None:
        """Take one more reference to a block that `match` found."""
        if self._references[block] == 0:
            del self._free[block]
            self.num_cached -= self._content[block] is not None
        self._references[block] += 1

    def register(self, block: int, parent: int, tokens: tuple[int, ...], fingerprint: Fingerprint) -> int:
        """Make a held, full block findable.

        Returns:
            The name of its content: that of an equal block if there already is one.
        """
        if not self.prefix_caching:
            return 0
        key = (parent, tokens, fingerprint)
        twin = self.match(*key)
        if twin is not None:
            return twin[1]
        name, self._next_name = self._next_name, self._next_name + 1
        self._found[key] = block
        self._content[block] = (key, name)
        return name

    def forget(self, block: int) -> None:
        """Make a block's content unfindable; harmless if it has none."""
        content = self._content[block]
        if content is not None:
            del self._found[content[0]]
            self._content[block] = None
            self.num_cached -= self._references[block] == 0
