"""A file of flags is right as a whole, or refused with the reason."""

from datetime import date
from pathlib import Path

import pytest

from esper.config.base import ConfigError, validate
from esper.release.errors import UnknownFlagError
from esper.release.flags import FlagFile, environment_of, load_flags, overrides_of

ROOT = Path(__file__).parents[3]


def test_the_projects_flags_are_right_and_off():
    file = load_flags(ROOT / "configs/flags.yaml")
    assert {"kasmina.parallel", "kasmina.triton", "tamiyo.learned", "tamiyo.remote"} <= {
        *file.flags
    }
    assert all(f.rollout_bp == 0 and not f.default for f in file.flags.values())


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ({"rollout_bp": 10_100}, "rollout_bp must be less than or equal to 10000, but got 10100"),
        ({"rollout_bp": -1}, "rollout_bp must be greater than or equal to 0"),
        ({"rollout_bp": 5.5}, "rollout_bp must be a valid integer"),
        ({"rollout_bp": "5"}, "rollout_bp must be a number without quotes"),
        ({"killed": "yes"}, "killed must be true or false"),
        ({"rolout_bp": 5}, "did you mean 'rollout_bp'"),
        ({"owner": " "}, "owner must"),
        ({"expires": "soon"}, "expires must"),
        ({"allowed": ["m"], "blocked": ["m"]}, "'m' is both"),
        ({"rollout_bp": 5, "default": True}, "default must be false beside rollout_bp"),
        ({"prerequisites": ["bb"]}, "got 'bb'; did you mean 'b'"),
        ({"prerequisites": ["a"]}, "not run in a circle, but a needs a"),
        ({"environments": {"cii": True}}, "got 'cii'; did you mean 'ci'"),
        ({"rules": [{"when": {}, "serve": True}]}, "rules.0.when must have at least 1 item"),
        ({"rules": [{"when": {"device": []}, "serve": True}]}, "rules.0.when.device must have at"),
        ({"rules": [{"when": {"device": ["cpu"]}}]}, "serve must be given"),
    ],
)
def test_a_wrong_flag_is_refused(make_file, flag, message):
    with pytest.raises(ConfigError, match=message):
        make_file(a=flag, b={})


def test_every_flag_has_an_owner_and_an_expiry():
    bare = {"version": 1, "flags": {"a": {"description": "x"}}}
    with pytest.raises(ConfigError) as caught:
        validate(FlagFile, bare, source="test")
    assert "flags.a.owner must be given" in str(caught.value)
    assert "flags.a.expires must be given" in str(caught.value)


def test_a_circle_is_shown_as_it_runs(make_file):
    with pytest.raises(ConfigError, match=r"circle, but (\w needs ){3}\w;"):
        make_file(a={"prerequisites": ["b"]}, b={"prerequisites": ["c"]},
                  c={"prerequisites": ["a"]})  # fmt: skip


@pytest.mark.parametrize("name", ["A", "a-b", "a..b", ".a", "a.", "1a", "", "a b"])
def test_a_name_that_no_variable_could_have_is_refused(make_file, name):
    with pytest.raises(ConfigError, match="must match pattern"):
        make_file(**{name: {}})


def test_two_flags_cannot_share_a_variable(make_file):
    with pytest.raises(ConfigError, match=r"a_b and a\.b share ESPER_FLAG_A_B"):
        make_file(a_b={}, a__b={})


def test_variables_decide_flags_of_the_file_alone(make_file):
    file = make_file(a__b={}, c={})
    environ = {"ESPER_FLAG_A_B": "ON", "ESPER_FLAG_C": "off", "HOME": "/"}
    assert overrides_of(file, environ) == {"a.b": True, "c": False}
    with pytest.raises(ConfigError, match="must name a flag; did you mean 'ESPER_FLAG_A_B'"):
        overrides_of(file, {"ESPER_FLAG_AB": "on"})
    with pytest.raises(ConfigError, match="ESPER_FLAG_C must be on or off, but got '2'"):
        overrides_of(file, {"ESPER_FLAG_C": "2"})


def test_the_environment_must_be_one_of_the_files(make_file):
    file = make_file(a={})
    assert environment_of(file, {}) is None
    assert environment_of(file, {"ESPER_ENVIRONMENT": "ci"}) == "ci"
    with pytest.raises(ConfigError, match="got 'cii'; did you mean 'ci'"):
        environment_of(file, {"ESPER_ENVIRONMENT": "cii"})


def test_a_flag_expires_after_its_day(make_file):
    file = make_file(a={"expires": "2026-01-31"}, b={})
    assert file.expired(date(2026, 1, 31)) == []
    assert file.expired(date(2026, 2, 1)) == ["a"]


def test_an_unknown_flag_has_no_default(make_file):
    with pytest.raises(UnknownFlagError, match=r"got 'kasmina\.paralel'; did you mean"):
        make_file(kasmina__parallel={}).flag("kasmina.paralel")
