import inspect
import pickle

import pytest

from macdrop import errors
from tune import errors as tune_errors


def _below(kind: type) -> set[type]:
    return {each for direct in kind.__subclasses__() for each in (direct, *_below(direct))}


KINDS = sorted(
    {c for module in (errors, tune_errors) for _, c in inspect.getmembers(module, inspect.isclass)}
    & {errors.MacDropError, *_below(errors.MacDropError)},
    key=lambda kind: kind.__name__,
)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_errors_survive_pickling_completely(kind, protocol):
    error = kind("k is 9.\nAllowed: 0 to 8.")
    error.__notes__ = ["trial 3"]
    back = pickle.loads(pickle.dumps(error, protocol))
    assert type(back) is kind
    assert str(back) == str(error)
    assert back.args == error.args
    assert back.__notes__ == error.__notes__


def test_every_error_that_a_user_can_fix_is_a_value_error():
    assert {kind.__name__ for kind in KINDS if issubclass(kind, ValueError)} == {
        "ConfigError",
        "UnsupportedModel",
        "NoMassiveWeights",
        "DataError",
        "CheckpointError",
        "PackageUnavailable",
    }


def test_nearest_suggests_only_similar_names():
    assert errors.nearest("stpe", ["step", "exp"]) == " Did you mean 'step'?"
    assert errors.nearest("zzz", ["step", "exp"]) == ""
    assert errors.nearest(None, ["step", "exp"]) == ""
