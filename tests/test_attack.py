"""Claims about attacks: a few cases of each class (all of them: `make attack`), and faults that have to be found."""

import pytest
from attack.planted import FAULTS
from attack.run import CLASSES, serve
from children import processes

SHARE = 0.01


@pytest.fixture(scope="module")
def attacker():
    """A process that has imported everything and may fork: ask it for a class or a fault, and get rows."""
    ours, theirs = processes().Pipe()
    process = processes().Process(target=serve, args=(theirs,))
    process.start()
    theirs.close()

    def ask(*request):
        ours.send(request)
        return ours.recv()

    yield ask
    ours.send(None)
    process.join(60)


@pytest.mark.parametrize("name", CLASSES)
def test_a_share_of_each_class_is_clean(name, attacker):
    rows = attacker("class", name, SHARE)
    assert rows and [row for row in rows if row["complaint"]] == []


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_reported(name, attacker):
    (row,) = attacker("fault", name)
    assert FAULTS[name][1] in row["complaint"]
    assert any("evaluate outputs" in line for line in row["story"])
