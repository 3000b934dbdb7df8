"""What steps read and multiply, and what they are spared by zeros."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class WeightSizes:
    """Bytes of a model's weights, by how a step reads them.

    Attributes:
        layers: All layers, norms and biases included.
        neuron: One neuron's rows of `up` and `down`, in one layer.
        head: Output matrix and the norm before it.
        embedding_row: One token's.
    """

    layers: int
    neuron: int
    head: int
    embedding_row: int


class FfnWork:
    """Cumulative reads and savings of all steps. A multiplication with its addition counts as two operations (FLOPs).

    Written by the engine thread only. Readers copy: a torn read is off by one step at most.

    Args:
        hidden: Width of the model.
        neurons: Of the feed-forward, in all layers.
        sizes: Of the weights.

    Attributes:
        neurons_read: Neurons whose rows of `up` and `down` were read, one count for each step and layer.
        neurons_skipped: Neurons that were left out because no row of the step needed them.
        flops_skipped: Operations of `up` and `down` that RELU rows were spared.
        weight_bytes: Weights read from memory: each that a step needs once, whatever its number of rows.
    """

    def __init__(self, hidden: int, neurons: int, sizes: WeightSizes) -> None:
        self._hidden = hidden
        self._neurons = neurons
        self._sizes = sizes
        self.reset()

    def reset(self) -> None:
        """Forget all counts."""
        self.neurons_read = self.neurons_skipped = 0
        self.flops_skipped = 0
        self.weight_bytes = 0

    def add(self, rows: int, head_reads: int, neurons_read: int | None, relu_rows: int, relu_zeros: int) -> None:
        """Count a step.

        Args:
            rows: Token rows.
            head_reads: Times that the output matrix was read.
            neurons_read: Over all layers; None for all of them.
            relu_rows: Rows in RELU mode.
            relu_zeros: Their zeros of all layers; they count only where neurons were left out.
        """
        read = self._neurons if neurons_read is None else neurons_read
        skipped = self._neurons - read
        self.neurons_read += read
        self.neurons_skipped += skipped
        sizes = self._sizes
        self.weight_bytes += (
            sizes.layers - skipped * sizes.neuron + head_reads * sizes.head + rows * sizes.embedding_row
        )
        if skipped:
            # `up` leaves out what no row needs, `down` each row's own zeros.
            self.flops_skipped += 2 * self._hidden * (relu_rows * skipped + relu_zeros)

    def dense_flops(self, elements: int) -> int:
        """Operations of the feed-forward for so many gate values without skipping: gate, up and down."""
        return 6 * self._hidden * elements
