"""Tables of `siluette eval`."""

from collections.abc import Sequence

from rich.table import Table

from engine import ActivationMode
from evaluation.best_of_n import ControlResult
from evaluation.grid import describe
from evaluation.open_ended import OpenEndedResult
from evaluation.perplexity import PerplexityResult
from evaluation.sparsity import SparsityResult

MISSING = "-"


def perplexity_table(results: Sequence[PerplexityResult]) -> Table:
    """A row for each text and activation; the last columns compare with SILU on the same text."""
    table = _table("text", "activation", "tokens", "passes", "nll", "perplexity", "± stderr", "x silu", "± stderr")
    bases = {result.text: result for result in results if result.activation.mode is ActivationMode.SILU}
    for result in results:
        base = bases.get(result.text)
        ratio, ratio_stderr = (None, None) if base is None or base is result else result.ratio_to(base)
        table.add_row(
            result.text,
            describe(result.activation),
            f"{result.tokens:,}",
            str(result.passes),
            f"{result.nll:.4f}",
            f"{result.perplexity:,.2f}",
            _number(result.stderr, 2),
            _number(ratio),
            _number(ratio_stderr),
        )
    return table


def sparsity_table(results: Sequence[SparsityResult]) -> Table:
    """A column for each text and activation, a row for each layer and one for their mean."""
    table = _table("layer", *(f"{result.text}, {describe(result.activation)}" for result in results), words=1)
    for layer, shares in enumerate(zip(*(result.zeros for result in results), strict=True)):
        table.add_row(str(layer), *(f"{share:.1%}" for share in shares))
    table.add_section()
    table.add_row("mean", *(f"{result.mean:.1%}" for result in results))
    return table


def questions_table(results: Sequence[ControlResult]) -> Table:
    """A row for each control: best-of-N accuracy, diversity, agreement with greedy SILU."""
    sizes = [entry.n for entry in results[0].best_of]
    table = _table("control", *(f"best of {n}" for n in sizes), "unique", "self-BLEU", "= greedy SILU", words=1)
    for result in results:
        table.add_row(
            result.control.label,
            *(
                f"{entry.accuracy:.1%}" + ("" if entry.stderr is None else f" ± {entry.stderr:.1%}")
                for entry in result.best_of
            ),
            f"{result.diversity.unique:.2f}",
            _number(result.diversity.self_bleu),
            f"{result.agreement.equal:.1%}",
        )
    return table


def diversity_table(results: Sequence[OpenEndedResult]) -> Table:
    """A row for each control: diversity, and agreement with greedy SILU."""
    columns = ("control", "distinct-1", "distinct-2", "distinct-3", "self-BLEU", "unique", "words", "common prefix")
    table = _table(*columns, words=1)
    for result in results:
        diversity, agreement = result.diversity, result.agreement
        table.add_row(
            result.control.label,
            _number(diversity.distinct_1),
            _number(diversity.distinct_2),
            _number(diversity.distinct_3),
            _number(diversity.self_bleu),
            f"{diversity.unique:.2f}",
            f"{diversity.mean_words:.1f}",
            f"{agreement.common_prefix:.1f} of {agreement.reference_tokens:.1f}",
        )
    return table


def _table(*columns: str, words: int = 2) -> Table:
    """A table whose first `words` columns are text and whose others are figures."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < words else "right", overflow="fold")
    return table


def _number(value: float | None, digits: int = 3) -> str:
    return MISSING if value is None else f"{value:,.{digits}f}"
