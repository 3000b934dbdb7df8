import pytest

from engine import MeasuredQuality


def test_a_checkpoint_says_how_good_it_is() -> None:
    quality = MeasuredQuality.from_metadata(
        {"siluette.perplexity": '{"essay": {"silu": 12, "relu": 13.5}}', "siluette.sparsity": "[0.5, 0.75]"}
    )

    assert quality.perplexity == {"essay": {"silu": 12.0, "relu": 13.5}}
    assert quality.sparsity == (0.5, 0.75)
    assert quality.mean_sparsity == 0.625


def test_most_checkpoints_say_nothing() -> None:
    quality = MeasuredQuality.from_metadata({"format": "pt"})

    assert quality == MeasuredQuality()
    assert quality.mean_sparsity is None


@pytest.mark.parametrize(
    "metadata",
    [
        {"siluette.perplexity": "{"},
        {"siluette.perplexity": "[1]"},
        {"siluette.perplexity": '{"essay": 3}'},
        {"siluette.perplexity": '{"essay": {"silu": "low"}}'},
        {"siluette.sparsity": "0.5"},
        {"siluette.sparsity": '["high"]'},
        {"siluette.sparsity": "[[1]]"},
    ],
)
def test_nonsense_is_refused(metadata: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"siluette|Expecting|could not convert"):
        MeasuredQuality.from_metadata(metadata)
