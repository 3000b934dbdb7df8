"""What the command line prints."""

import io

import pytest
from rich.console import Console

from engine import Activation, ActivationMode, FinishReason, SampleOutput
from server.console import describe_activation, print_samples, printable, zero_shares


def samples(count: int) -> list[SampleOutput]:
    return [SampleOutput(i, f"text of sample {i}", [1, 2], finish_reason=FinishReason.STOP) for i in range(count)]


def printed(outputs: list[SampleOutput], width: int, terminal: bool) -> list[str]:
    file = io.StringIO()
    print_samples(Console(file=file, width=width, force_terminal=terminal, color_system=None), outputs)
    return file.getvalue().splitlines()


class TestPrintSamples:
    @pytest.mark.parametrize(
        ("width", "count", "expected"), [(200, 3, 3), (80, 3, 2), (120, 4, 2), (60, 3, 1), (20, 2, 1)]
    )
    def test_as_many_columns_as_fit_side_by_side(self, width: int, count: int, expected: int) -> None:
        lines = printed(samples(count), width, terminal=True)
        assert lines[0].count("╭") == expected
        assert sum(line.count("╭") for line in lines) == count
        assert max(map(len, lines)) <= width

    def test_order_is_that_of_the_samples(self) -> None:
        text = "\n".join(printed(samples(3)[::-1], 200, terminal=False))
        assert text.index("sample 0") < text.index("sample 1") < text.index("sample 2")

    def test_markup_in_a_text_stays_text(self) -> None:
        output = SampleOutput(0, "[bold]x[/bold] [/]", [1], finish_reason=FinishReason.LENGTH)
        for terminal in (True, False):
            assert "[bold]x[/bold] [/]" in "\n".join(printed([output, *samples(2)[1:]], 120, terminal))


class TestPrintable:
    def test_escape_sequences_lose_their_power(self) -> None:
        assert printable("a\x1b[2Jb\x9b1mc\x07\x7f\r") == "a[2Jb1mc"

    def test_text_stays_as_it_is(self) -> None:
        assert printable("Zeile\n\tdäñ 日本 🙂") == "Zeile\n\tdäñ 日本 🙂"


class TestDescribeActivation:
    def test_says_all_that_a_repetition_needs(self) -> None:
        activation = Activation(ActivationMode.STOCHASTIC, p=0.75, seed=3)
        assert describe_activation(activation) == "stochastic, p 0.75, activation seed 3, scope all"

    def test_silu_has_nothing_to_add(self) -> None:
        assert describe_activation(Activation()) == "silu"


class TestZeroShares:
    def test_share_is_over_all_layers_and_modes_that_ran(self) -> None:
        zeros = {ActivationMode.SILU: [0, 0], ActivationMode.RELU: [30, 90]}
        elements = {ActivationMode.SILU: [0, 0], ActivationMode.RELU: [100, 100]}
        assert zero_shares(zeros, elements) == {ActivationMode.RELU: 0.6}
