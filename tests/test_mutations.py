"""tests/mutation_check.py takes an hour or two: here only that its mutations still have a place to be made."""

import mutation_check

ROOT = mutation_check.ROOT


def test_every_mutation_has_its_one_place():
    lost = [
        f"{name}: {file} has {count} of {pattern!r}"
        for name, file, pattern, *_ in mutation_check.MUTATIONS
        if (count := (ROOT / file).read_text().count(pattern)) != 1
    ]
    assert not lost, "\n".join(lost)


def test_every_mutation_has_tests_that_are_there():
    files = {word for *_, tests in mutation_check.MUTATIONS for word in tests if word.endswith(".py")}
    assert len(files) > 20 and not [file for file in sorted(files) if not (ROOT / file).is_file()]
