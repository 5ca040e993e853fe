"""Failed assertions in the helpers shall show their values, as those in tests do."""

import pytest

pytest.register_assert_rewrite("tests.support.image", "tests.support.replay", "tests.support.round_trip")
