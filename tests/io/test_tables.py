from lightning_sgm.io.tables import table


def test_numbers_with_their_errors():
    found = table(
        {
            "test/nll": 5.284698209919772,
            "test/standard_error": 0.00040177828171617517,
            "test/perplexity": 197.2946,
            "test/perplexity_standard_error": 0.0792686985982391,
            "test/one/nll": 12.5,
            "test/one/standard_error": 1.25,
            "test/samples/evaluations": 81.5,
            "test/big": 1234567.0,
            "test/exact": 2.0,
            "test/exact_standard_error": 0.0,
            "test/alone": 1.0,
            "test/alone_standard_error": float("nan"),
        }
    )
    assert found.splitlines() == [
        "test/alone                1",
        "test/big                  1.2346e+06",
        "test/exact                2",
        "test/nll                  5.28470 ± 0.00040",
        "test/one/nll              12.5 ± 1.2",
        "test/perplexity           197.295 ± 0.079",
        "test/samples/evaluations  81.5",
    ]


def test_nothing_and_an_error_without_its_value():
    assert table({}) == ""
    assert table({"standard_error": 0.5}) == "standard_error  0.5"
